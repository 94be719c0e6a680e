"""Synthetic client matters in LAB's own task format, with machine-checkable criteria."""

from .generate import DIFFICULTIES, Difficulty, Document, Fact, Matter, generate_matter
from .questions import question_set

__all__ = ["DIFFICULTIES", "Difficulty", "Document", "Fact", "Matter", "generate_matter", "question_set"]
