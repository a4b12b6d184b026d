"""The standard form of an item: turns of a conversation, and the paths of the images that their symbols stand for.

`conversations` is a list of turns, human first and alternating, after an optional leading system turn; `image` is a
path or a list of paths. Each `<|image|>` in the turns stands for one image, in order.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from data.vocab import IMAGE_SYMBOL

ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}


class ItemError(ValueError):
    """This item cannot be used; the message is the reason. The others go on."""


class FormatError(ItemError):
    """The item is not of this format at all, so the whole input is likely not: nothing should be started on it."""


@dataclass(frozen=True)
class Turn:
    """What one side says. `role` is "human", "gpt" or "system"; only gpt turns are predicted."""

    role: str
    text: str


@dataclass(frozen=True)
class Conversation:
    """Turns whose image symbols match `image_paths` in number and order."""

    turns: tuple[Turn, ...]
    image_paths: tuple[str, ...] = ()


def parse_conversation(raw: Mapping) -> Conversation:
    """The conversation of one raw item. Raises FormatError without `conversations`, ItemError for any other reason."""
    if not isinstance(raw, Mapping):
        raise FormatError(f"an item must be an object with `conversations`, got {_brief(raw)}")
    if "conversations" not in raw:
        keys = ", ".join(f"`{key}`" for key in list(raw)[:8]) or "no keys at all"
        raise FormatError(f"an item must have `conversations`, this one has {keys}")
    turns = _parse_turns(raw["conversations"])
    image_paths = _parse_image_paths(raw.get("image"))
    num_symbols = sum(turn.text.count(IMAGE_SYMBOL) for turn in turns)
    if image_paths and not num_symbols:
        first = replace(turns[0], text=f"{IMAGE_SYMBOL} " * len(image_paths) + turns[0].text)
        return Conversation((first, *turns[1:]), image_paths)
    if num_symbols != len(image_paths):
        raise ItemError(
            f"the text has {num_symbols} {IMAGE_SYMBOL} but `image` lists {len(image_paths)}; "
            "each symbol stands for one image"
        )
    return Conversation(turns, image_paths)


def _parse_turns(raw_turns: object) -> tuple[Turn, ...]:
    if not isinstance(raw_turns, list) or not raw_turns:
        raise ItemError(f"`conversations` must be a list of turns that is not empty, got {_brief(raw_turns)}")
    turns = tuple(_parse_turn(raw, index) for index, raw in enumerate(raw_turns))
    speaking = turns[1:] if turns[0].role == "system" else turns
    for index, turn in enumerate(speaking):
        expected = ("human", "gpt")[index % 2]
        if turn.role != expected:
            position = index + len(turns) - len(speaking)
            raise ItemError(
                f"turn {position} is from {turn.role}, {expected} expected: turns alternate, human first, "
                "after an optional leading system turn"
            )
    if len(speaking) < 2:
        raise ItemError("there is nothing to predict: no turn is from gpt")
    return turns


def _parse_turn(raw: object, index: int) -> Turn:
    if not isinstance(raw, Mapping) or "from" not in raw or "value" not in raw:
        raise ItemError(f"turn {index} must be an object with `from` and `value`, got {_brief(raw)}")
    role, text = raw["from"], raw["value"]
    if not isinstance(role, str) or role not in ROLES:
        raise ItemError(f"turn {index} is from {_brief(role)}; `from` must be one of {', '.join(ROLES)}")
    if not isinstance(text, str):
        raise ItemError(f"`value` of turn {index} must be text, got {_brief(text)}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ItemError(f"`value` of turn {index} holds half of a surrogate pair, which is no text") from None
    return Turn(ROLES[role], text)


def _parse_image_paths(raw: object) -> tuple[str, ...]:
    if raw is None or raw == "":
        return ()
    paths = [raw] if isinstance(raw, str) else raw
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise ItemError(f"`image` must be a path or a list of paths, got {_brief(raw)}")
    return tuple(paths)


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
