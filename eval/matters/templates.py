"""The sentences of the synthetic matters: statements, amendments, questions and fillers.

`{c}` is the party (the key) and `{v}` the value. The last statement, amendment and question of every
attribute are *unseen templates*: training never shows them, evaluation reports them in rows of their own.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Attribute:
    """One thing that can be known of a party: how it is stated, changed and asked for."""

    name: str
    kind: str
    statements: tuple[str, ...]
    amendments: tuple[str, ...]
    questions: tuple[str, ...]


ATTRIBUTES = (
    Attribute(
        "fee", "sum",
        ("The fee due to {c} is {v}.", "{c} earns a fee of {v}.", "To {c} falls a fee of {v}.",
         "The adviser owes {c} a fee of {v}.", "For its work {c} invoices {v}."),
        ("The fee due to {c} is now {v}.", "The fee of {c} changes to {v}.", "{c} earns a new fee of {v}.",
         "The fee of {c} was reset to {v}."),
        ("What is the fee due to {c}?", "Which fee does {c} earn?", "State the fee of {c}.",
         "How much does {c} invoice?"),
    ),
    Attribute(
        "rent", "sum",
        ("The rent paid by {c} is {v}.", "{c} pays a rent of {v}.", "On {c} falls a rent of {v}.",
         "The landlord bills {c} a rent of {v}.", "As tenant {c} pays {v}."),
        ("The rent paid by {c} is now {v}.", "The rent of {c} changes to {v}.", "{c} pays a new rent of {v}.",
         "The rent of {c} was reset to {v}."),
        ("What is the rent paid by {c}?", "Which rent does {c} pay?", "State the rent of {c}.",
         "How much does {c} pay as tenant?"),
    ),
    Attribute(
        "loan", "sum",
        ("The loan made to {c} is {v}.", "{c} borrows {v}.", "To {c} goes a loan of {v}.",
         "The lender grants {c} a loan of {v}.", "As borrower {c} draws {v}."),
        ("The loan made to {c} is now {v}.", "The loan of {c} changes to {v}.", "{c} takes a new loan of {v}.",
         "The loan of {c} was reset to {v}."),
        ("What is the loan made to {c}?", "Which loan does {c} take?", "State the loan of {c}.",
         "How much does {c} draw as borrower?"),
    ),
    Attribute(
        "cap", "sum",
        ("The liability of {c} is capped at {v}.", "{c} is liable up to {v}.", "For {c} there is a cap of {v}.",
         "The contract caps claims on {c} at {v}.", "No claim on {c} may exceed {v}."),
        ("The liability of {c} is now capped at {v}.", "The cap of {c} changes to {v}.",
         "{c} has a new cap of {v}.", "The cap of {c} was reset to {v}."),
        ("What is the liability cap of {c}?", "Which cap protects {c}?", "State the cap of {c}.",
         "How much may be claimed from {c}?"),
    ),
    Attribute(
        "expiry", "date",
        ("The term of {c} ends on {v}.", "{c} is bound until {v}.", "For {c} the term ends on {v}.",
         "The licence of {c} expires on {v}.", "As for {c} it is free after {v}."),
        ("The term of {c} now ends on {v}.", "The end date of {c} changes to {v}.",
         "{c} is now bound until {v}.", "The end date of {c} was reset to {v}."),
        ("When does the term of {c} end?", "Until when is {c} bound?", "State the end date of {c}.",
         "When is {c} free?"),
    ),
    Attribute(
        "signing", "date",
        ("The deed of {c} was signed on {v}.", "{c} signed on {v}.", "For {c} the deed was signed on {v}.",
         "The contract with {c} is dated {v}.", "The signature of {c} bears the date {v}."),
        ("The deed of {c} is now dated {v}.", "The signing date of {c} changes to {v}.",
         "{c} signed again on {v}.", "The signing date of {c} was reset to {v}."),
        ("When was the deed of {c} signed?", "On which day did {c} sign?", "State the signing date of {c}.",
         "Which date does the signature of {c} bear?"),
    ),
    Attribute(
        "delivery", "date",
        ("Delivery to {c} is due on {v}.", "{c} expects delivery on {v}.", "To {c} the goods come on {v}.",
         "The carrier delivers to {c} on {v}.", "The shipment for {c} lands on {v}."),
        ("Delivery to {c} is now due on {v}.", "The delivery date of {c} changes to {v}.",
         "{c} now expects delivery on {v}.", "The delivery date of {c} was reset to {v}."),
        ("When is delivery to {c} due?", "On which day does {c} expect delivery?",
         "State the delivery date of {c}.", "When does the shipment for {c} land?"),
    ),
    Attribute(
        "hearing", "date",
        ("The claim of {c} is heard on {v}.", "{c} appears in court on {v}.", "For {c} the court sits on {v}.",
         "The hearing of {c} is set for {v}.", "The judge sees {c} on {v}."),
        ("The claim of {c} is now heard on {v}.", "The hearing date of {c} changes to {v}.",
         "{c} now appears in court on {v}.", "The hearing date of {c} was reset to {v}."),
        ("When is the claim of {c} heard?", "On which day does {c} appear in court?",
         "State the hearing date of {c}.", "When does the judge see {c}?"),
    ),
    Attribute(
        "counsel", "person",
        ("The counsel of {c} is {v}.", "{c} is advised by {v}.", "For {c} the counsel is {v}.",
         "The lawyer named by {c} is {v}.", "On behalf of {c} speaks {v}."),
        ("The counsel of {c} is now {v}.", "The counsel of {c} changes to {v}.", "{c} is now advised by {v}.",
         "The new lawyer of {c} is {v}."),
        ("Who is the counsel of {c}?", "Who advises {c}?", "Name the counsel of {c}.", "Who speaks for {c}?"),
    ),
    Attribute(
        "director", "person",
        ("The director of {c} is {v}.", "{c} is led by {v}.", "For {c} the director is {v}.",
         "The board of {c} is chaired by {v}.", "At the head of {c} stands {v}."),
        ("The director of {c} is now {v}.", "The director of {c} changes to {v}.", "{c} is now led by {v}.",
         "The new director of {c} is {v}."),
        ("Who is the director of {c}?", "Who leads {c}?", "Name the director of {c}.",
         "Who stands at the head of {c}?"),
    ),
    Attribute(
        "guarantor", "person",
        ("The guarantor of {c} is {v}.", "{c} is backed by {v}.", "For {c} the guarantor is {v}.",
         "The debts of {c} are secured by {v}.", "Behind {c} stands {v}."),
        ("The guarantor of {c} is now {v}.", "The guarantor of {c} changes to {v}.", "{c} is now backed by {v}.",
         "The new guarantor of {c} is {v}."),
        ("Who is the guarantor of {c}?", "Who backs {c}?", "Name the guarantor of {c}.",
         "Who stands behind {c}?"),
    ),
    Attribute(
        "account", "reference",
        ("The account of {c} is number {v}.", "{c} holds account number {v}.",
         "To {c} belongs account number {v}.", "Payments reach {c} on account number {v}.",
         "The bank knows {c} as number {v}."),
        ("The account of {c} is now number {v}.", "The account of {c} changes to number {v}.",
         "{c} now holds account number {v}.", "The account of {c} was reset to number {v}."),
        ("What is the account number of {c}?", "Which account does {c} hold?", "State the account number of {c}.",
         "As which number does the bank know {c}?"),
    ),
    Attribute(
        "docket", "reference",
        ("The docket of {c} is number {v}.", "{c} appears under docket number {v}.",
         "To {c} belongs docket number {v}.", "The court lists {c} as number {v}.",
         "The clerk filed {c} under number {v}."),
        ("The docket of {c} is now number {v}.", "The docket of {c} changes to number {v}.",
         "{c} now appears under docket number {v}.", "The docket of {c} was reset to number {v}."),
        ("What is the docket number of {c}?", "Under which docket does {c} appear?",
         "State the docket number of {c}.", "Under which number did the clerk file {c}?"),
    ),
    Attribute(
        "permit", "reference",
        ("The permit of {c} is number {v}.", "{c} trades under permit number {v}.",
         "To {c} belongs permit number {v}.", "The ministry gave {c} permit number {v}.",
         "The register shows {c} as number {v}."),
        ("The permit of {c} is now number {v}.", "The permit of {c} changes to number {v}.",
         "{c} now trades under permit number {v}.", "The permit of {c} was reset to number {v}."),
        ("What is the permit number of {c}?", "Under which permit does {c} trade?",
         "State the permit number of {c}.", "As which number does the register show {c}?"),
    ),
)  # fmt: skip

FILLERS = (
    "The parties met in good faith.",
    "Nothing further was agreed.",
    "Counsel took note of the point.",
    "The annex is kept with the file.",
    "Costs lie where they fall.",
    "The translation is not binding.",
    "Headings are for convenience only.",
    "Time is of the essence.",
    "The clause survives termination.",
    "No waiver is implied.",
    "Words in the singular include the plural.",
    "The schedule forms part of this paper.",
)
"""Sentences that nobody asks about."""

VALUE_FILLERS = {
    "sum": "The clerk paid {v} for stamps.",
    "date": "The copy was scanned on {v}.",
    "person": "Minutes were taken by {v}.",
    "reference": "The box is stored as number {v}.",
}
"""Distractors: a value of a kind that is asked for, of no party."""


def pick(options: tuple[str, ...], unseen: bool) -> tuple[str, ...]:
    """The templates of one side of the split: the last one is unseen, the others are trained on."""
    return options[-1:] if unseen else options[:-1]
