"""A language of short stories whose law is known exactly.

A story is drawn in two steps. First every *slot* gets a value; slots form a forest, so with ``pa(s)`` the at
most one parent of slot ``s``

    p(slots) = prod_s p(s | pa(s)),        p(v | u) = w(u, v) / sum_v' w(u, v'),   w small positive integers.

Then the slots are written into one fixed template, which draws nothing. Every text can be read back in at
most one way (checked when a `Grammar` is built), hence, exactly and in nats,

    log p(text) = sum_s log p(s | pa(s)),      H = sum_s sum_u P(pa(s) = u) H(s | pa(s) = u).

No other model's opinion is needed to say how good a model of this language is.

The law of `STORY`, told with brackets around what may be left out:

    Anna was a kind girl with a red kite.                          hero, trait, object, adjective | object
    One [sunny] morning she went to the park and fed the ducks.    weather, time, place, activity | place
    [A gray squirrel followed her.]                                visitor | place
    Her friend Tom looked sad, so Anna told him a funny joke.      friend | hero, mood, deed | mood
    [They flew the kite together.]                                 play
    [After the joke] Tom felt happy and thanked Anna,              echo | play, feeling | deed
    who took her red kite home [from the park].                    homeward | play

What has to agree over the distance: the hero's name with girl/boy, she/he, her/him, her/his; the friend's
name with her/him; the two names, whose roles never swap; the object, its adjective, and what one does with
it; the place, what is done there, who is met there, and where one comes home from; the friend's mood, the
deed that answers it, and the feeling that the deed leaves. `echo` and `homeward` are told only where `play`
is not.

A text is words joined by single spaces, '.' and ',' attached to the word before: ``tokenize`` and
``detokenize`` go from one form to the other. `Grammar.judge` reads the skeleton loosely (any name where a
name belongs, any place where a place belongs ...) and then says by name which agreements are broken. Its
rules for `STORY`:

    form        the text does not follow the template at all, or is not spaced canonically
    gender      girl/boy does not fit the hero's name
    pronoun     she/he/her/him does not fit the name it stands for
    possessive  her/his does not fit the hero's name
    name        the hero is later called by a third name        friend    the same of the friend
    roles       hero and friend are one person, or have swapped places
    object      the object changes                              play      it is not played with in this way
    adjective   the object's adjective changes, or is one that this object never has
    place       the place changes                               activity  this is not done at that place
    visitor     this visitor is not met at that place
    need        the deed does not answer the friend's mood
    deed        verb or echo do not fit the deed                feeling   the deed does not leave this feeling
    pieces      optional pieces stand together that never do
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["STORY", "Grammar", "Slot", "Spec", "Verdict", "detokenize", "tokenize"]

Value: TypeAlias = str | None
Weights: TypeAlias = Mapping[Any, int]

FORM = "form"
_TOKEN = re.compile(r"[A-Za-z']+|[.,]")
_PHRASE = re.compile(r"[A-Za-z']+(?: [A-Za-z']+)*")
_PIECE = re.compile(
    r"\s+|\[(?P<open>\w+):|(?P<close>\])|\{(?P<slot>\w+)(?:\.(?P<form>\w+))?\}|(?P<word>[A-Za-z']+|[.,])"
)
_CHUNK = 1 << 15  # rows of uniforms drawn at a time: bounds memory, does not change the stream
_MAX_STORIES = 1_000_000


def tokenize(text: str) -> list[str]:
    """Words and punctuation of `text`, in order."""
    return _TOKEN.findall(text)


def detokenize(tokens: Iterable[str]) -> str:
    """The canonical text: tokens joined by spaces, none before '.' and ','."""
    return "".join(token if token in ".," else " " + token for token in tokens).lstrip(" ")


@dataclass(frozen=True)
class Slot:
    """One choice. `table` maps value -> weight, or, with a parent, parent value -> (value -> weight).

    A value is a phrase (words joined by single spaces) or None for "not told"; weights are integers >= 1.
    """

    name: str
    table: Mapping[Any, Any]
    parent: str | None = None


@dataclass(frozen=True)
class Spec:
    """A law: slots (parents before children), a template, and the names of its agreement rules.

    Template: words, '.', ',' and placeholders. ``{slot}`` is the slot's value, ``{slot.form}`` the text that
    ``forms[slot][form]`` gives for the value (``{slot.Form}``: the same, capitalised), ``[slot: ...]`` a
    piece told when the slot is not None. Outside such a piece a slot that is None writes nothing.

    `rules` names what is broken; keys are ``slot`` (a repeated value differs), ``slot.form`` (a form
    differs), ``child|parent`` (a value its parent's value never has); default: the slot's name. `swaps` lists
    pairs of slots with rule ``roles``: the name of one standing where the other's belongs.
    """

    slots: tuple[Slot, ...]
    template: str
    forms: Mapping[str, Mapping[str, Mapping[str, str]]] = field(default_factory=dict)
    rules: Mapping[str, str] = field(default_factory=dict)
    swaps: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Verdict:
    """`valid`, the names of the `broken` rules, and the `slots` read at first mention (None: not parsed)."""

    valid: bool
    broken: tuple[str, ...]
    slots: Mapping[str, Value] | None


# --------------------------------------------------------------------------------------------------- the law

_GIRLS = {"Anna": 3, "Bella": 2, "Clara": 2, "Daisy": 2, "Emma": 3, "Lily": 2, "Mia": 3, "Rosa": 1}
_BOYS = {"Ben": 3, "Finn": 2, "Hugo": 1, "Jack": 2, "Leo": 3, "Max": 2, "Sam": 2, "Tom": 3}
_NAMES = _GIRLS | _BOYS

# object -> (what they did with it, its adjectives)
_OBJECTS: dict[str, tuple[int, str, dict[str, int]]] = {
    "kite": (3, "flew", {"red": 3, "blue": 2, "yellow": 2, "pretty": 1}),
    "ball": (3, "rolled", {"red": 2, "green": 2, "soft": 2, "big": 1}),
    "boat": (3, "sailed", {"wooden": 3, "blue": 2, "tiny": 2, "painted": 1}),
    "book": (2, "opened", {"big": 2, "green": 2, "pretty": 2, "blue": 1}),
    "drum": (2, "beat", {"painted": 2, "wooden": 2, "big": 2, "red": 1}),
    "doll": (2, "dressed", {"pretty": 3, "soft": 2, "tiny": 2, "wooden": 1}),
    "bell": (1, "rang", {"silver": 3, "shiny": 2, "tiny": 2, "painted": 1}),
    "flute": (1, "played", {"silver": 2, "wooden": 2, "shiny": 2, "tiny": 1}),
    "wagon": (2, "pulled", {"red": 3, "wooden": 2, "big": 2, "yellow": 1}),
    "truck": (2, "pushed", {"yellow": 2, "green": 2, "shiny": 2, "big": 1}),
    "robot": (2, "wound", {"shiny": 3, "silver": 2, "blue": 2, "green": 1}),
    "basket": (1, "filled", {"yellow": 2, "pretty": 2, "soft": 1, "big": 1}),
    "puppet": (2, "moved", {"soft": 2, "painted": 2, "green": 2, "tiny": 1}),
    "puzzle": (2, "solved", {"painted": 2, "wooden": 2, "pretty": 1, "blue": 1}),
    "scooter": (3, "rode", {"silver": 2, "blue": 2, "red": 2, "shiny": 1}),
    "lantern": (1, "lit", {"yellow": 2, "shiny": 2, "silver": 1, "green": 1}),
}

# place -> (what is done there, who is met there)
_PLACES: dict[str, tuple[int, dict[str, int], dict[str, int]]] = {
    "park": (
        3,
        {"fed the ducks": 3, "climbed the oak": 2, "raced along paths": 2},
        {"gray squirrel followed": 3, "young robin greeted": 2},
    ),
    "beach": (
        3,
        {"gathered pink shells": 3, "built sand towers": 3, "jumped over waves": 2},
        {"white gull circled": 2, "small crab passed": 2},
    ),
    "farm": (
        2,
        {"milked the cows": 2, "brushed the pony": 3, "counted the sheep": 2},
        {"brown hen followed": 2, "woolly lamb nudged": 3},
    ),
    "forest": (
        2,
        {"picked wild berries": 3, "crossed the stream": 2, "hid behind trees": 2},
        {"wise owl watched": 2, "shy fox passed": 2},
    ),
    "lake": (
        2,
        {"skipped flat stones": 3, "caught two fish": 2, "rowed past reeds": 1},
        {"proud swan circled": 2, "little frog startled": 2},
    ),
    "garden": (
        2,
        {"watered the roses": 3, "planted bean seeds": 2, "swept dry leaves": 2},
        {"bright butterfly visited": 3, "slow snail amused": 2},
    ),
    "market": (
        2,
        {"bought fresh bread": 3, "tasted some cheese": 2, "smelled ripe melons": 2},
        {"busy baker greeted": 2, "noisy parrot teased": 2},
    ),
    "zoo": (
        2,
        {"photographed the lions": 2, "laughed at monkeys": 3, "waved at bears": 2},
        {"tall giraffe noticed": 2, "playful seal splashed": 3},
    ),
    "library": (
        1,
        {"studied old maps": 2, "borrowed three novels": 2, "learned short poems": 1},
        {"sleepy cat joined": 2, "patient teacher helped": 2},
    ),
    "museum": (
        1,
        {"admired huge dinosaurs": 3, "sketched stone masks": 2, "touched moon rocks": 2},
        {"friendly guard guided": 2, "cheerful painter noticed": 1},
    ),
}

# mood of the friend -> deed -> (weight, verb, echo, feelings it leaves)
_DEEDS: dict[str, tuple[int, dict[str, tuple[int, str, str, dict[str, int]]]]] = {
    "sad": (
        3,
        {
            "a funny joke": (3, "told", "After the joke", {"happy": 3, "cheerful": 2, "silly": 1}),
            "a sweet song": (2, "sang", "After the song", {"calm": 2, "happy": 2, "hopeful": 1}),
        },
    ),
    "hungry": (
        3,
        {
            "a juicy peach": (2, "gave", "After the peach", {"glad": 2, "strong": 2}),
            "a warm bun": (2, "brought", "After the bun", {"glad": 1, "cozy": 2, "full": 3}),
        },
    ),
    "bored": (
        2,
        {
            "a new game": (3, "taught", "After the game", {"cheerful": 2, "proud": 2, "smart": 1}),
            "a long story": (2, "read", "After the story", {"calm": 2, "curious": 3, "happy": 1}),
        },
    ),
    "cold": (
        2,
        {
            "a thick scarf": (2, "lent", "With the scarf", {"snug": 2, "cozy": 2}),
            "a hot cocoa": (2, "poured", "After the cocoa", {"snug": 2, "calm": 1, "glad": 1}),
        },
    ),
    "lost": (
        2,
        {
            "a simple map": (3, "drew", "With the map", {"safe": 3, "smart": 2, "hopeful": 1}),
            "a secret trail": (1, "showed", "On the trail", {"safe": 1, "proud": 2, "curious": 1}),
        },
    ),
    "scared": (
        2,
        {
            "a strong torch": (2, "handed", "With the torch", {"brave": 3, "safe": 2, "strong": 1}),
            "a golden coin": (1, "found", "With the coin", {"lucky": 3, "brave": 2, "hopeful": 1}),
        },
    ),
}


def _forms(girl: str, boy: str) -> dict[str, str]:
    return dict.fromkeys(_GIRLS, girl) | dict.fromkeys(_BOYS, boy)


def _each_deed() -> Iterator[tuple[str, tuple[int, str, str, dict[str, int]]]]:
    for _, deeds in _DEEDS.values():
        yield from deeds.items()


STORY = Spec(
    slots=(
        Slot("hero", _NAMES),
        Slot("friend", {hero: {n: w for n, w in _NAMES.items() if n != hero} for hero in _NAMES}, "hero"),
        Slot(
            "trait", {"kind": 3, "quiet": 1, "clever": 2, "gentle": 2, "merry": 2, "polite": 1, "lively": 2}
        ),
        Slot("object", {thing: weight for thing, (weight, _, _) in _OBJECTS.items()}),
        Slot("adjective", {thing: adjectives for thing, (_, _, adjectives) in _OBJECTS.items()}, "object"),
        Slot("weather", {None: 3, "sunny": 3, "windy": 2, "cloudy": 1}),
        Slot("time", {"morning": 3, "afternoon": 2, "day": 2}),
        Slot("place", {place: weight for place, (weight, _, _) in _PLACES.items()}),
        Slot("activity", {place: activities for place, (_, activities, _) in _PLACES.items()}, "place"),
        Slot(
            "visitor",
            {place: {None: sum(met.values()), **met} for place, (_, _, met) in _PLACES.items()},
            "place",
        ),
        Slot("mood", {mood: weight for mood, (weight, _) in _DEEDS.items()}),
        Slot(
            "deed", {mood: {d: v[0] for d, v in deeds.items()} for mood, (_, deeds) in _DEEDS.items()}, "mood"
        ),
        Slot("feeling", {deed: feelings for deed, (_, _, _, feelings) in _each_deed()}, "deed"),
        Slot("play", {None: 3, "together": 2}),
        Slot("echo", {None: {None: 2, "told": 1}, "together": {None: 1}}, "play"),
        Slot("homeward", {None: {None: 2, "from": 1}, "together": {None: 1}}, "play"),
    ),
    template="""
        {hero} was a {trait} {hero.child} with a {adjective} {object}.
        One {weather} {time} {hero.she} went to the {place} and {activity}.
        [visitor: A {visitor} {hero.him}.]
        {hero.His} friend {friend} looked {mood}, so {hero} {deed.verb} {friend.him} {deed}.
        [play: They {object.verb} the {object} {play}.]
        [echo: {deed.echo}] {friend} felt {feeling} and thanked {hero},
        who took {hero.his} {adjective} {object} home [homeward: {homeward} the {place}].
    """,
    forms={
        "hero": {
            "child": _forms("girl", "boy"),
            "she": _forms("she", "he"),
            "him": _forms("her", "him"),
            "his": _forms("her", "his"),
        },
        "friend": {"him": _forms("her", "him")},
        "object": {"verb": {thing: verb for thing, (_, verb, _) in _OBJECTS.items()}},
        "deed": {
            "verb": {deed: verb for deed, (_, verb, _, _) in _each_deed()},
            "echo": {deed: echo for deed, (_, _, echo, _) in _each_deed()},
        },
    },
    rules={
        "hero": "name",
        "hero.child": "gender",
        "hero.she": "pronoun",
        "hero.him": "pronoun",
        "friend.him": "pronoun",
        "hero.his": "possessive",
        "friend|hero": "roles",
        "object.verb": "play",
        "deed|mood": "need",
        "echo|play": "pieces",
        "homeward|play": "pieces",
    },
    swaps=(("hero", "friend"),),
)


# ----------------------------------------------------------------------------------------------- the machine


@dataclass(frozen=True)
class _Hole:
    """A placeholder: what it writes for each value of its slot, each word led by its space."""

    slot: int
    form: str | None
    texts: tuple[str, ...]
    key: str  # of the rule, e.g. "hero.his"


@dataclass(frozen=True)
class _Bracket:
    """A piece told when its slot is not None."""

    slot: int
    items: tuple[str | _Hole, ...]


def _nearest(name: object, known: Iterable[str]) -> str:
    names = list(known)
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.0)
    return f"the nearest known name is {close[0]!r}; known: {', '.join(names)}" if close else "none is known"


def _shown(value: Value) -> str:
    return "" if value is None else "".join(" " + word for word in value.split(" "))


def _led(token: str) -> str:
    return token if token in ".," else " " + token


class Grammar:
    """The exact law of a `Spec`: sampling, probability, judgement, marginals.

    Attributes: `vocabulary` (sorted words and punctuation), `slots` (names), `rules` (names, in the order in
    which `Verdict.broken` lists them), `entropy` (nats per story), `min_tokens`, `max_tokens` (words plus
    punctuation, without an end token), `hash` (sha256 hex of the canonical JSON of the law).

    ValueError: the spec is not a law (missing parent, weight < 1, unknown placeholder, ambiguous text ...).
    """

    def __init__(self, spec: Spec = STORY) -> None:
        self.spec = spec
        self.slots: tuple[str, ...] = tuple(slot.name for slot in spec.slots)
        self._index = {name: i for i, name in enumerate(self.slots)}
        self._values: list[tuple[Value, ...]] = []
        self._parent: list[int] = []
        self._table: list[NDArray[np.float64]] = []  # p(value | parent value); one row for a root
        self._marginal: list[NDArray[np.float64]] = []
        if not spec.slots:
            raise ValueError("Spec.slots is empty: a law needs at least one slot; add a Slot(name, weights)")
        for i, slot in enumerate(spec.slots):
            self._add_slot(i, slot)
        self._position = [{v: k for k, v in enumerate(values)} for values in self._values]
        self._check_forms()
        self._items = self._read_template()
        self._check_visible()
        self._check_unambiguous()
        self._compile()
        with np.errstate(divide="ignore"):
            self._log_table = [np.log(table).tolist() for table in self._table]
        self.entropy: float = math.fsum(self._slot_entropy(i) for i in range(len(self.slots)))
        self.min_tokens, self.max_tokens = self._lengths()
        self.hash: str = hashlib.sha256(
            json.dumps(_canonical(spec), ensure_ascii=True, separators=(",", ":")).encode("ascii")
        ).hexdigest()

    # -------------------------------------------------------------------------------- reading the declaration

    def _add_slot(self, i: int, slot: Slot) -> None:
        name = slot.name
        if not re.fullmatch(r"[a-z_]\w*", name):
            raise ValueError(f"slot name {name!r} is not a plain lower-case name; rename it, e.g. 'place'")
        if self._index[name] != i:
            raise ValueError(f"slot {name!r} is declared twice: its law would not be unique; rename one")
        rows: list[Weights]
        if slot.parent is None:
            parent, rows = -1, [slot.table]
        else:
            parent = self._index.get(slot.parent, len(self.slots))
            if parent >= i:
                why = "is declared after it" if slot.parent in self._index else "does not exist"
                earlier = self.slots[:i]
                raise ValueError(
                    f"the parent {slot.parent!r} of slot {name!r} {why}: parents come first, so that the "
                    f"slots form a forest; {_nearest(slot.parent, earlier)}"
                )
            keys = self._values[parent]
            if set(slot.table) != set(keys):
                odd = sorted(map(str, set(slot.table) ^ set(keys)))
                raise ValueError(
                    f"slot {name!r} needs one row of weights per value of its parent {slot.parent!r}; "
                    f"these are missing or unknown: {odd}"
                )
            rows = [slot.table[key] for key in keys]
        for row in rows:
            if not isinstance(row, Mapping) or not row:
                raise ValueError(
                    f"slot {name!r} has the row {row!r}: give a mapping value -> weight, not empty"
                )
            for value, weight in row.items():
                if value is not None and not (isinstance(value, str) and _PHRASE.fullmatch(value)):
                    raise ValueError(
                        f"slot {name!r} has the value {value!r}: use None or words joined by single spaces"
                    )
                if isinstance(weight, bool) or not isinstance(weight, int) or weight <= 0:
                    raise ValueError(
                        f"slot {name!r}, value {value!r} has the weight {weight!r}: weights are integers "
                        ">= 1 (leave out a value that never occurs)"
                    )
        values = tuple(dict.fromkeys(chain.from_iterable(rows)))
        table = np.array([[row.get(v, 0) / sum(row.values()) for v in values] for row in rows], np.float64)
        self._values.append(values)
        self._parent.append(parent)
        self._table.append(table)
        self._marginal.append(table[0] if parent < 0 else self._marginal[parent] @ table)

    def _check_forms(self) -> None:
        for name, forms in self.spec.forms.items():
            if name not in self._index:
                raise ValueError(
                    f"forms are given for the unknown slot {name!r}; {_nearest(name, self.slots)}"
                )
            told = {v for v in self._values[self._index[name]] if v is not None}
            for form, texts in forms.items():
                if set(texts) != told:
                    raise ValueError(
                        f"form {name}.{form} needs one text per value of {name!r}; missing or unknown: "
                        f"{sorted(map(str, set(texts) ^ told))}"
                    )
                for value, text in texts.items():
                    if not _PHRASE.fullmatch(text):
                        raise ValueError(
                            f"form {name}.{form} of {value!r} is {text!r}: use words joined by single spaces"
                        )
        for pair in self.spec.swaps:
            for name in pair:
                if name not in self._index:
                    raise ValueError(f"swaps names the unknown slot {name!r}; {_nearest(name, self.slots)}")

    def _read_template(self) -> tuple[str | _Hole | _Bracket, ...]:
        template = self.spec.template
        items: list[str | _Hole | _Bracket] = []
        inside: list[str | _Hole] | None = None
        key = -1
        at = 0
        while at < len(template):
            piece = _PIECE.match(template, at)
            if piece is None:
                raise ValueError(
                    f"the template cannot be read at {template[at : at + 20]!r}: use words, '.', ',', "
                    "{slot}, {slot.form} and [slot: ...]"
                )
            at = piece.end()
            group = piece.groupdict()
            item: str | _Hole
            if group["open"]:
                if inside is not None:
                    raise ValueError(f"piece [{group['open']}: stands inside another; close that one first")
                key = self._slot_named(group["open"], f"[{group['open']}: ...]")
                if None not in self._position[key]:
                    raise ValueError(
                        f"piece [{group['open']}: ...] is always told, as slot {group['open']!r} is never "
                        "None; drop the brackets or add the value None"
                    )
                inside = []
                continue
            if group["close"]:
                if inside is None:
                    raise ValueError("the template closes ']' a piece that was not opened; remove it")
                if not inside:
                    raise ValueError(f"piece [{self.slots[key]}: ] is empty: give it words or remove it")
                items.append(_Bracket(key, tuple(inside)))
                inside = None
                continue
            if group["slot"]:
                item = self._hole(group["slot"], group["form"])
            elif group["word"]:
                item = _led(group["word"])
            else:
                continue
            if inside is None:
                items.append(item)
            else:
                inside.append(item)
        if inside is not None:
            raise ValueError(f"piece [{self.slots[key]}: ... is never closed; add ']'")
        return tuple(items)

    def _slot_named(self, name: str, where: str) -> int:
        if name not in self._index:
            raise ValueError(f"the template has {where}, but no such slot; {_nearest(name, self.slots)}")
        return self._index[name]

    def _hole(self, name: str, form: str | None) -> _Hole:
        label = name if form is None else f"{name}.{form}"
        slot = self._slot_named(name, f"{{{label}}}")
        if form is None:
            return _Hole(slot, None, tuple(map(_shown, self._values[slot])), name)
        forms = self.spec.forms.get(name, {})
        capital = form not in forms and form[:1].isupper()
        base = form[:1].lower() + form[1:] if capital else form
        if base not in forms:
            raise ValueError(
                f"the template has {{{label}}}, but slot {name!r} has no such form; {_nearest(form, forms)}"
            )
        texts = []
        for value in self._values[slot]:
            text = None if value is None else forms[base][value]
            texts.append(_shown(text[:1].upper() + text[1:] if text and capital else text))
        return _Hole(slot, form, tuple(texts), f"{name}.{base}")

    # ----------------------------------------------------------------------- checks: one text, one derivation

    def _holes(self) -> Iterator[tuple[_Hole, int]]:
        """Every hole in order, with the slot of the piece around it (-1: none)."""
        for item in self._items:
            if isinstance(item, _Hole):
                yield item, -1
            elif isinstance(item, _Bracket):
                for part in item.items:
                    if isinstance(part, _Hole):
                        yield part, item.slot

    def _check_visible(self) -> None:
        """Every slot that is not None must show in the text, or the text would not tell its value."""
        pieces = {item.slot for item in self._items if isinstance(item, _Bracket)}
        for s, name in enumerate(self.slots):
            around = {key for hole, key in self._holes() if hole.slot == s and hole.form is None}
            told = [v for v in self._values[s] if v is not None]
            if -1 in around or s in around:
                continue
            parent = self._parent[s]
            if parent in around:
                hidden = self._table[s][self._position[parent][None]]  # the piece around it is not told here
                none = self._position[s].get(None)
                if all(p == 0 for k, p in enumerate(hidden) if k != none):
                    continue
            elif not around and s in pieces and len(told) == 1:
                continue
            raise ValueError(
                f"slot {name!r} has values that the text does not show, so a text would have several "
                f"derivations; put {{{name}}} into the template where the slot is not None"
            )

    def _check_unambiguous(self) -> None:
        """No token string is a reading of the loose skeleton in two ways.

        The skeleton is an acyclic automaton over tokens; it is walked in pairs that read the same tokens. Two
        readings exist iff a pair that has parted meets again or ends together.
        """
        edges: list[list[tuple[str | None, int]]] = [[]]

        def fresh() -> int:
            edges.append([])
            return len(edges) - 1

        def write(start: int, tokens: Sequence[str], end: int) -> None:
            if not tokens:
                edges[start].append((None, end))
                return
            for token in tokens[:-1]:
                after = fresh()
                edges[start].append((token, after))
                start = after
            edges[start].append((tokens[-1], end))

        def add(start: int, item: str | _Hole, key: int) -> int:
            end = fresh()
            if isinstance(item, str):
                write(start, tokenize(item), end)
            else:
                # forms are not read, so equal texts are one path; inside its own piece a slot is not None
                texts = self._alternatives(item, key)
                for text in texts:
                    write(start, tokenize(text), end)
            return end

        state = 0
        for item in self._items:
            if isinstance(item, _Bracket):
                before = state
                for part in item.items:
                    state = add(state, part, item.slot)
                edges[before].append((None, state))
            else:
                state = add(state, item, -1)
        final = state

        moves: list[list[tuple[str, int]]] = [[] for _ in edges]
        ends = [0] * len(edges)

        def expand(origin: int, at: int) -> None:
            ends[origin] += at == final
            for token, after in edges[at]:
                if token is None:
                    expand(origin, after)
                else:
                    moves[origin].append((token, after))

        for origin in range(len(edges)):
            expand(origin, origin)

        def refuse(pair: tuple[int, int]) -> None:
            words: list[str] = []
            step: tuple[int, int] | None = pair
            while step is not None and came[step] is not None:
                before, token = came[step]  # type: ignore[misc]
                words.append(token)
                step = before
            text = detokenize(reversed(words))
            raise ValueError(
                f"the template is ambiguous: {text!r} can be read in two ways; make the texts of the slots "
                "around it differ or put a word between them"
            )

        came: dict[tuple[int, int], tuple[tuple[int, int], str] | None] = {(0, 0): None}
        stack = [(0, 0)]
        while stack:
            pair = p, q = stack.pop()
            forked = ends[p] > 1 or len(set(moves[p])) < len(moves[p])
            if forked if p == q else ends[p] and ends[q]:
                refuse(pair)
            for token, after in moves[p]:
                for other, beside in moves[q]:
                    if other != token:
                        continue
                    there = (after, beside)
                    if p != q and after == beside:
                        came[there] = (pair, token)
                        refuse(there)
                    # two moves of one state onto one state were refused above, so this pair has not parted
                    if there not in came:
                        came[there] = (pair, token)
                        stack.append(there)

    def _alternatives(self, hole: _Hole, key: int) -> tuple[str, ...]:
        told = [
            text
            for value, text in zip(self._values[hole.slot], hole.texts, strict=True)
            if value is not None or hole.slot != key
        ]
        return tuple(dict.fromkeys(told))

    # ---------------------------------------------------------------------------------------------- compiling

    def _compile(self) -> None:
        """The loose skeleton as one regular expression over ' ' + text, and what each of its groups means."""
        rules = dict(self.spec.rules)
        known: set[str] = set(self.slots) | {hole.key for hole, _ in self._holes()}
        known |= {f"{s.name}|{s.parent}" for s in self.spec.slots if s.parent is not None}
        for rule_key in rules:
            if rule_key not in known:
                raise ValueError(f"unknown key {rule_key!r} in rules; {_nearest(rule_key, sorted(known))}")

        def rule_of(rule_key: str) -> str:
            return rules.get(rule_key, re.split(r"[.|]", rule_key)[0])

        partners: dict[int, list[int]] = {}
        for a, b in self.spec.swaps:
            partners.setdefault(self._index[a], []).append(self._index[b])
            partners.setdefault(self._index[b], []).append(self._index[a])

        groups = 0
        pattern: list[str] = []
        self._readers: list[list[tuple[int, dict[str, int]]]] = [[] for _ in self.slots]
        self._piece_readers: list[int] = [-1] * len(self.slots)  # group of the piece that tells a slot
        holes: list[tuple[int, _Hole, bool]] = []
        pieces: list[tuple[int, int]] = []
        words: set[str] = set()

        def add(item: str | _Hole, key: int) -> str:
            nonlocal groups
            if isinstance(item, str):
                words.update(tokenize(item))
                return re.escape(item)
            texts = self._alternatives(item, key)
            words.update(chain.from_iterable(map(tokenize, texts)))
            first = item.form is None and not self._readers[item.slot]
            if item.form is None:
                values = {text: k for k, text in enumerate(item.texts) if text in texts}
                self._readers[item.slot].append((groups, values))
            if not first:
                holes.append((groups, item, item.form is None))
            groups += 1
            return "(" + "|".join(map(re.escape, texts)) + ")"

        for item in self._items:
            if isinstance(item, _Bracket):
                mine = groups
                groups += 1
                pieces.append((mine, item.slot))
                pattern.append("(" + "".join(add(part, item.slot) for part in item.items) + ")?")
            else:
                pattern.append(add(item, -1))
        for group, slot in reversed(pieces):
            if not self._readers[slot]:
                self._piece_readers[slot] = group
        self._regex = re.compile("".join(pattern))
        self._none = [position.get(None, -1) for position in self._position]
        self._told = [next((k for k, v in enumerate(values) if v is not None), -1) for values in self._values]
        # (group, slot, texts by value, rule, slots that may have swapped in)
        self._agreements = [
            (group, hole.slot, hole.texts, rule_of(hole.key), partners.get(hole.slot, []) if plain else [])
            for group, hole, plain in holes
        ]
        # a piece is told iff its slot is not None: to be checked only if the slot shows elsewhere too
        elsewhere = {hole.slot for hole, key in self._holes() if hole.form is None and key != hole.slot}
        told_in = [slot for _, slot in pieces]
        self._presences = [
            (group, slot, rule_of(self.slots[slot]))
            for group, slot in pieces
            if slot in elsewhere or told_in.count(slot) > 1
        ]
        self._supports = [
            (s, parent, (self._table[s] > 0).tolist(), rule_of(f"{self.slots[s]}|{self.slots[parent]}"))
            for s, parent in enumerate(self._parent)
            if parent >= 0
        ]
        self.vocabulary: tuple[str, ...] = tuple(sorted(words))
        named = [FORM, *(r for *_, r, _ in self._agreements), *(r for *_, r in self._presences)]
        named += ["roles"] * bool(partners) + [r for *_, r in self._supports]
        self.rules: tuple[str, ...] = tuple(dict.fromkeys(named))
        self._rule_order = {rule: k for k, rule in enumerate(self.rules)}
        self._keys = tuple(dict.fromkeys(slot for _, slot in pieces))
        self._plans: dict[tuple[bool, ...], list[tuple[int, tuple[str, ...]]]] = {}

    def _plan(self, present: tuple[bool, ...]) -> list[tuple[int, tuple[str, ...]]]:
        """(slot, texts by value) in order, for one set of told pieces; slot -1 is constant text."""
        plan = self._plans.get(present)
        if plan is None:
            on = dict(zip(self._keys, present, strict=True))
            plan = []
            flat = chain.from_iterable(
                (item.items if on[item.slot] else ()) if isinstance(item, _Bracket) else (item,)
                for item in self._items
            )
            for part in flat:
                if isinstance(part, _Hole):
                    plan.append((part.slot, part.texts))
                elif plan and plan[-1][0] == -1:
                    plan[-1] = (-1, (plan[-1][1][0] + part,))
                else:
                    plan.append((-1, (part,)))
            self._plans[present] = plan
        return plan

    def _render(self, picks: Sequence[int]) -> str:
        none = self._none
        plan = self._plan(tuple([picks[s] != none[s] for s in self._keys]))
        return "".join([texts[picks[slot]] if slot >= 0 else texts[0] for slot, texts in plan])[1:]

    # ------------------------------------------------------------------------------------------ exact numbers

    def _slot_entropy(self, s: int) -> float:
        table = self._table[s]
        logs = np.log(np.where(table > 0, table, 1.0))
        weight = np.ones(1) if self._parent[s] < 0 else self._marginal[self._parent[s]]
        return float(-(weight @ (table * logs).sum(axis=1)))

    def _lengths(self) -> tuple[int, int]:
        """Least and greatest number of tokens, over all stories of positive probability.

        Only slots on which the length depends, and their ancestors, are run through.
        """
        varies = set(self._keys)
        for hole, key in self._holes():
            lengths = {len(tokenize(text)) for text in self._alternatives(hole, key)}
            if len(lengths) > 1:
                varies.add(hole.slot)
        for s in reversed(range(len(self.slots))):
            if s in varies and self._parent[s] >= 0:
                varies.add(self._parent[s])
        order = sorted(varies)
        picks = [self._told[s] if self._told[s] >= 0 else 0 for s in range(len(self.slots))]
        least, greatest, seen = math.inf, 0, 0

        def walk(k: int) -> None:
            nonlocal least, greatest, seen
            if k == len(order):
                seen += 1
                if seen > _MAX_STORIES:
                    raise ValueError(
                        f"the length depends on more than {_MAX_STORIES} combinations of the slots "
                        f"{[self.slots[s] for s in order]}: give values of some of them equal word counts"
                    )
                size = len(tokenize(self._render(picks)))
                least, greatest = min(least, size), max(greatest, size)
                return
            s = order[k]
            for v, p in enumerate(self._table[s][picks[self._parent[s]] if self._parent[s] >= 0 else 0]):
                if p > 0:
                    picks[s] = v
                    walk(k + 1)

        walk(0)
        return int(least), greatest

    def _slot(self, name: str) -> int:
        if name not in self._index:
            raise KeyError(f"unknown slot {name!r}: {_nearest(name, self.slots)}")
        return self._index[name]

    def marginal(self, slot: str) -> dict[Value, float]:
        """P(slot = value) for every value, exact. KeyError: unknown slot."""
        s = self._slot(slot)
        return dict(zip(self._values[s], self._marginal[s].tolist(), strict=True))

    def pair_marginal(self, a: str, b: str) -> dict[tuple[Value, Value], float]:
        """P(a = x, b = y) wherever positive, exact: sum_u P(c = u) P(x | u) P(y | u), c the nearest common
        ancestor; a product if there is none. KeyError: unknown slot."""
        first, second = self._slot(a), self._slot(b)
        above = self._path(first)
        common = next((s for s in self._path(second) if s in above), -1)
        if common < 0:
            joint = np.outer(self._marginal[first], self._marginal[second])
        else:
            x, y = self._below(first, common), self._below(second, common)
            joint = (x * self._marginal[common][:, None]).T @ y
        return {
            (self._values[first][i], self._values[second][j]): float(joint[i, j])
            for i, j in zip(*np.nonzero(joint > 0), strict=True)
        }

    def _path(self, s: int) -> list[int]:
        """The slot and its ancestors, upwards."""
        path = [s]
        while self._parent[path[-1]] >= 0:
            path.append(self._parent[path[-1]])
        return path

    def _below(self, s: int, ancestor: int) -> NDArray[np.float64]:
        """The matrix P(s = value | ancestor = u)."""
        matrix = np.eye(len(self._values[s]))
        while s != ancestor:
            matrix = self._table[s] @ matrix
            s = self._parent[s]
        return matrix

    def count(self) -> int:
        """Number of different stories."""
        ways = [[1] * len(values) for values in self._values]
        total = 1
        for s in reversed(range(len(self.slots))):
            rows = [sum(w for w, p in zip(ways[s], row, strict=True) if p > 0) for row in self._table[s]]
            parent = self._parent[s]
            if parent < 0:
                total *= rows[0]
            else:
                ways[parent] = [w * r for w, r in zip(ways[parent], rows, strict=True)]
        return total

    def enumerate(self) -> Iterator[tuple[str, float]]:
        """All (text, log-probability), for small laws. ValueError: more than a million stories."""
        if self.count() > _MAX_STORIES:
            raise ValueError(
                f"this law has {self.count():.3g} stories, too many to list (at most {_MAX_STORIES}): use "
                "sample and log_prob, or a smaller Spec"
            )
        return self._walk([0] * len(self.slots), 0, 0.0)

    def _walk(self, picks: list[int], s: int, log_prob: float) -> Iterator[tuple[str, float]]:
        if s == len(self.slots):
            yield self._render(picks), log_prob
            return
        row = self._log_table[s][picks[self._parent[s]] if self._parent[s] >= 0 else 0]
        for v, log_p in enumerate(row):
            if log_p > -math.inf:
                picks[s] = v
                yield from self._walk(picks, s + 1, log_prob + log_p)

    # ---------------------------------------------------------------------------------------- telling stories

    def sample(self, num: int, seed: int) -> list[str]:
        """`num` independent stories. Story i depends on (seed, i) only: samples are prefixes of longer ones.

        ValueError: num < 1 or seed < 0.
        """
        if num < 1:
            raise ValueError(f"num is {num}: a sample has at least one story; give num >= 1")
        if seed < 0:
            raise ValueError(f"seed is {seed}: seeds are integers >= 0; give another")
        # one row of uniforms a story, drawn row by row, is what makes samples prefix-stable
        rng = np.random.Generator(np.random.Philox(seed))
        bounds = [np.cumsum(table, axis=1)[:, :-1] for table in self._table]
        stories: list[str] = []
        for start in range(0, num, _CHUNK):
            uniform = rng.random((min(_CHUNK, num - start), len(self.slots)))
            picks: NDArray[np.int64] = np.empty(uniform.shape, np.int64)
            for s, parent in enumerate(self._parent):
                draw = uniform[:, s]
                if parent < 0:
                    picks[:, s] = np.searchsorted(bounds[s][0], draw, side="right")
                else:
                    picks[:, s] = (draw[:, None] >= bounds[s][picks[:, parent]]).sum(axis=1)
            rows: list[list[int]] = picks.tolist()
            stories.extend(self._render(row) for row in rows)
        return stories

    def render(self, slots: Mapping[str, Value]) -> str:
        """The text of an assignment of every slot (of positive probability or not).

        KeyError: unknown or missing slot; ValueError: a value that the slot does not have.
        """
        for name in slots:
            self._slot(name)
        picks = []
        for s, name in enumerate(self.slots):
            if name not in slots:
                raise KeyError(f"slot {name!r} has no value: give one of {self._values[s]}")
            if slots[name] not in self._position[s]:
                raise ValueError(f"slot {name!r} has no value {slots[name]!r}: give one of {self._values[s]}")
            picks.append(self._position[s][slots[name]])
        return self._render(picks)

    def _read(self, text: str) -> tuple[list[int], tuple[Any, ...]] | None:
        match = self._regex.fullmatch(" " + text)
        if match is None:
            return None
        groups = match.groups()
        picks = []
        for s, readers in enumerate(self._readers):
            pick = self._none[s]
            if self._piece_readers[s] >= 0 and groups[self._piece_readers[s]] is not None:
                pick = self._told[s]
            for group, values in readers:
                told = groups[group]
                if told is not None:
                    pick = values[told]
                    break
            picks.append(pick)
        return picks, groups

    def _broken(self, picks: Sequence[int], groups: Sequence[Any]) -> set[str]:
        broken: set[str] = set()
        for group, slot, texts, rule, partners in self._agreements:
            told = groups[group]
            if told is not None and told != texts[picks[slot]]:
                swapped = any(told == _shown(self._values[other][picks[other]]) for other in partners)
                broken.add("roles" if swapped else rule)
        for group, slot, rule in self._presences:
            if (groups[group] is not None) != (picks[slot] != self._none[slot]):
                broken.add(rule)
        for s, parent, allowed, rule in self._supports:
            if not allowed[picks[parent]][picks[s]]:
                broken.add(rule)
        return broken

    def judge(self, text: str) -> Verdict:
        """Which rules `text` breaks. Valid iff `log_prob` is finite."""
        read = self._read(text)
        if read is None:
            return Verdict(False, (FORM,), None)
        picks, groups = read
        broken = self._broken(picks, groups)
        if not broken and self._render(picks) != text:
            broken.add(FORM)  # cannot happen while every hole is checked; the last word is the law's
        slots = {name: values[k] for name, values, k in zip(self.slots, self._values, picks, strict=True)}
        return Verdict(not broken, tuple(sorted(broken, key=self._rule_order.__getitem__)), slots)

    def log_prob(self, text: str) -> float:
        """log p(text) in nats; -inf outside the language."""
        read = self._read(text)
        if read is None:
            return -math.inf
        picks, _ = read
        if self._render(picks) != text:
            return -math.inf
        return math.fsum(
            self._log_table[s][picks[parent] if parent >= 0 else 0][picks[s]]
            for s, parent in enumerate(self._parent)
        )


def _canonical(spec: Spec) -> list[Any]:
    """The law as nested lists: order is part of it, since it fixes which story a seed tells."""

    def pairs(table: Mapping[Any, Any]) -> list[list[Any]]:
        return [[key, pairs(value) if isinstance(value, Mapping) else value] for key, value in table.items()]

    return [
        [[slot.name, slot.parent, pairs(slot.table)] for slot in spec.slots],
        " ".join(spec.template.split()),
        pairs(spec.forms),
        pairs(spec.rules),
        [list(pair) for pair in spec.swaps],
    ]
