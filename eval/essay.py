"""Essay-like English from a small grammar: haystacks and keys for RULER, made locally and without a licence to mind."""

from __future__ import annotations

import random
import re

ADJECTIVES = tuple(
    re.findall(
        r"\w+",
        """
    able ample amber ancient ardent austere bashful bitter blunt bold brave breezy brisk broad calm candid
    careful chilly civil clever coarse cosy crisp curious damp daring deep dense distant drowsy dusty eager
    early earnest elegant faint fancy feeble fertile fierce final flat fluent fond frail frank fresh frosty
    gentle giddy glad gloomy graceful grand grave hardy hasty hollow honest humble idle jolly keen kind lavish
    lean lively lofty lonely loyal lucky mellow merry mild misty modest narrow neat nimble noble odd pale
    patient placid plain proud prudent quaint quick quiet rapid rare ready robust rough rustic scarce serene
    sharp shy silent simple sleek slender smooth sober solemn solid sparse stark steady stern stout subtle sunny
    swift tame tender thrifty tidy timid tranquil upright vague vivid warm weary wild wise witty zesty
    """,
    )
)
NOUNS = tuple(
    re.findall(
        r"\w+",
        """
    acorn anchor anvil apron arch arrow badge barrel basin basket beacon bell bench blanket boulder bridge broom
    bucket button cabin candle canoe canyon carpet cavern chapel cliff clock cloud compass copper coral cottage
    cradle crater curtain dagger desert diary ditch dolphin drum eagle easel ember engine falcon feather fence
    ferry fiddle flute forest fossil fountain garden glacier goblet granite hammer harbor harvest hearth hedge
    helmet heron hill island ivory jacket jungle kettle ladder lagoon lantern lemon locket magnet maple marble
    meadow mirror mitten monument mountain needle oasis orchard otter paddle palace parrot pebble pepper pillow
    planet plough pocket pony prairie puddle quarry quilt rabbit rafter ribbon river saddle sail scarf shell
    shovel sparrow spindle statue summit temple thistle timber tower tunnel turtle valley velvet village violin
    walnut whistle willow window
    """,
    )
)
SUBJECTS = (
    "a good teacher", "the founder of a small company", "every patient reader", "a city that grows too fast",
    "the best editor", "an honest critic", "the second draft", "a careful programmer", "a long walk",
    "most of what we learn at school", "the habit of writing daily", "a quiet room", "the person who asks first",
    "a team without a plan", "an old library", "the market for new ideas", "a friend who disagrees",
    "the craft of building things", "anyone with enough time", "the simplest tool",
)  # fmt: skip
VERBS = (
    "changes", "rewards", "hides", "explains", "outlives", "slows down", "depends on", "improves", "questions",
    "resembles", "protects", "needs", "reveals", "ignores", "teaches", "replaces",
)  # fmt: skip
OBJECTS = (
    "the work itself", "a way of thinking", "the problems worth having", "what customers say", "an open question",
    "the first honest answer", "a taste for detail", "ideas that look wrong", "the courage to begin",
    "other people's plans", "the pleasure of making", "rules nobody wrote", "what remains unsaid",
    "a mistake made early", "the cost of waiting", "the shape of a career", "small and steady effort",
    "things that last",
)  # fmt: skip
SHAPES = (
    "{s} {v} {o}.",
    "It took me years to see that {s} {v} {o}.",
    "{s} {v} {o}, and with it {p}.",
    "When {s} {v} {o}, the effect is {a}.",
    "People say that {s} {v} {o}, but few ask about {p}.",
    "There is something {a} in the way {s} {v} {o}.",
    "If you care about {p}, remember that {s} {v} {o}.",
    "What looks {a} from outside is often that {s} {v} {o}.",
)


def essay_sentence(rng: random.Random) -> str:
    """One sentence, without numbers, names or anything that could be taken for a needle."""
    subject, verb, thing, other = (rng.choice(words) for words in (SUBJECTS, VERBS, OBJECTS, OBJECTS))
    sentence = rng.choice(SHAPES).format(s=subject, v=verb, o=thing, p=other, a=rng.choice(ADJECTIVES))
    return sentence[0].upper() + sentence[1:]
