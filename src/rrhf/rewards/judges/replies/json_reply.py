"""Replies that are JSON, or hold it: in a fence, after a preface, one object or one a response."""

from __future__ import annotations

import json
import re
from typing import Any

from rrhf.rewards.judges.replies.scale import TOTALS, Refused, Scale, Sheet, add, cell, fold, response_number

NUMBER_KEYS = ("response", "answer", "id", "index", "number", "response id", "response number", "response index")
SCORES_KEYS = ("scores", "ratings", "aspects", "score", "rating", "evaluation")
VALUE_KEYS = ("score", "rating", "value")


def find_json(text: str) -> tuple[list[Any], str, str] | None:
    """The objects and lists of objects in ``text``, with the text before the first and after the last.

    Returns:
        None where there is none.

    Raises:
        Refused: what begins as JSON is none, a name stands twice in an object, or a value is NaN or infinite.
    """
    decoder = json.JSONDecoder(object_pairs_hook=_unrepeated, parse_constant=_no_constant)
    values: list[Any] = []
    place, begin, end = 0, 0, 0
    while (place := _next_bracket(text, place)) >= 0:
        try:
            value, stop = decoder.raw_decode(text, place)
        except RecursionError:
            raise Refused("JSON that is nested too deeply") from None
        except ValueError:
            if text[place] == "{" or text[place : place + 100].lstrip("[ \n").startswith(("{", '"')):
                raise Refused("JSON that is broken or cut") from None
            place += 1
            continue
        if isinstance(value, dict) or any(isinstance(entry, dict) for entry in value):
            if values and text[end:place].strip(" \n\t,;`json"):
                raise Refused("words between two pieces of JSON")
            begin, end = (begin if values else place), stop
            values.append(value)
        place = stop
    return (values, text[:begin], text[end:]) if values else None


def _next_bracket(text: str, start: int) -> int:
    places = [place for place in (text.find(bracket, start) for bracket in "{[") if place >= 0]
    return min(places, default=-1)


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [fold(name) for name, _ in pairs]
    if len(set(names)) < len(names):
        raise Refused("JSON with a name twice in one object")
    return dict(pairs)


def _no_constant(name: str) -> Any:
    raise Refused(f"JSON with {name}")


def read_json(values: list[Any], scale: Scale, number: int) -> Sheet:
    """The scores that JSON ``values`` hold for ``number`` responses. Raises ``Refused``."""
    _refuse_other_scale(values, scale)
    if len(values) > 1:
        if not all(isinstance(value, dict) for value in values):
            raise Refused("several pieces of JSON")
        return _entries(values, scale, number)
    return _value(values[0], scale, number)


def _refuse_other_scale(value: Any, scale: Scale) -> None:
    """Refuse an entry that calls itself the scale, or its range, and is not ours."""
    if isinstance(value, list):
        for entry in value:
            _refuse_other_scale(entry, scale)
    elif isinstance(value, dict):
        for name, entry in value.items():
            if isinstance(entry, str) and {"scale", "range"} & set(fold(name).split()):
                numbers = {float(found) for found in re.findall(r"[0-9]{1,9}(?:\.[0-9]+)?", entry)}
                if not numbers <= {scale.low, scale.high}:
                    raise Refused("another scale is stated")
            _refuse_other_scale(entry, scale)


def _value(value: Any, scale: Scale, number: int) -> Sheet:
    if isinstance(value, list):
        return _entries(value, scale, number)
    if any(scale.aspect(name) for name in value):
        inner = [entry for name, entry in value.items() if scale.aspect(name)]
        if all(isinstance(entry, list) or (isinstance(entry, dict) and _is_by_response(entry)) for entry in inner):
            return _by_aspect(value, scale, number)
        return _entries([value], scale, number)
    if _is_by_response(value):
        sheet: Sheet = {}
        for name, entry in value.items():
            place = response_number(name)
            if place is None:
                _only_words(name, entry)
            else:
                _add_entry(sheet, place, entry, scale)
        return sheet
    held = [entry for entry in value.values() if isinstance(entry, dict | list)]
    if len(held) != 1 or any(fold(name) in NUMBER_KEYS and not isinstance(value[name], list | dict) for name in value):
        # One response's object with its scores in an object of their own, or something else altogether.
        return _entries([value], scale, number)
    for name, entry in value.items():
        if entry is not held[0]:
            _only_words(name, entry)
    return _value(held[0], scale, number)


def _is_by_response(value: dict[str, Any]) -> bool:
    return any(response_number(name) is not None for name in value)


def _entries(entries: list[Any], scale: Scale, number: int) -> Sheet:
    """One object a response, which tells its number, or else stands at its place among as many as there are."""
    if not all(isinstance(entry, dict) for entry in entries):
        raise Refused("JSON whose list holds more than objects")
    named = [_number_of(entry) for entry in entries]
    if all(place is None for place in named):
        if len(entries) != number:
            raise Refused(f"{len(entries)} objects without numbers for {number} responses")
        named = list(range(1, number + 1))
    if any(place is None for place in named):
        raise Refused("JSON objects with and without a response's number")
    sheet: Sheet = {}
    for place, entry in zip(named, entries):
        assert place is not None
        _add_entry(sheet, place, {name: held for name, held in entry.items() if not _names_number(name, held)}, scale)
    return sheet


def _names_number(name: str, value: Any) -> bool:
    if fold(name) not in NUMBER_KEYS or isinstance(value, bool) or not isinstance(value, int | str):
        return False
    return response_number(str(value)) is not None


def _number_of(entry: dict[str, Any]) -> int | None:
    numbers = [response_number(str(value)) for name, value in entry.items() if _names_number(name, value)]
    if len(set(numbers)) > 1:
        raise Refused("JSON with two numbers for one response")
    return numbers[0] if numbers else None


def _add_entry(sheet: Sheet, place: int, entry: Any, scale: Scale) -> None:
    """The scores of one response: an object of aspects, a list in their order, or, of one aspect, its score."""
    if place in sheet:
        raise Refused(f"response {place} is scored twice")
    sheet[place] = {}
    if isinstance(entry, list) and len(entry) == len(scale.aspects):
        entry = dict(zip(scale.aspects, entry))
    elif not isinstance(entry, dict) and len(scale.aspects) == 1:
        entry = {scale.aspects[0]: entry}
    if not isinstance(entry, dict):
        raise Refused(f"response {place}: not one score an aspect")
    nested = [name for name, held in entry.items() if fold(name) in SCORES_KEYS and isinstance(held, dict)]
    if len(nested) == 1 and not any(scale.aspect(name) for name in entry):
        outer = {name: held for name, held in entry.items() if name != nested[0]}
        entry = {**outer, **entry[nested[0]]}
    totals = []
    for name, held in entry.items():
        aspect = scale.aspect(name)
        kind = next((word for word in TOTALS if word in fold(name).split()), None)
        if aspect is not None:
            add(sheet, place, aspect, scale.score(*_number(held, f"response {place}: {aspect}"), f"response {place}"))
        elif kind is not None:
            totals.append((kind, *_number(held, f"response {place}: {name}")))
        else:
            _only_words(name, held)
    for kind, value, denominator in totals:
        scale.check_total(kind, value, denominator, sheet[place])


def _by_aspect(value: dict[str, Any], scale: Scale, number: int) -> Sheet:
    sheet: Sheet = {}
    for name, held in value.items():
        aspect = scale.aspect(name)
        if aspect is None:
            _only_words(name, held)
            continue
        if isinstance(held, list):
            if len(held) != number:
                raise Refused(f"{aspect}: {len(held)} scores for {number} responses")
            held = {str(place): score for place, score in enumerate(held, 1)}
        for label, score in held.items():
            place = response_number(label)
            if place is None:
                raise Refused(f"{aspect}: {label!r} is no response")
            add(sheet, place, aspect, scale.score(*_number(score, f"response {place}: {aspect}"), f"response {place}"))
    return sheet


def _number(value: Any, where: str) -> tuple[float, float | None]:
    """A score and what it is out of: a number, its text, or an object that holds one beside words."""
    if isinstance(value, dict):
        held = [entry for name, entry in value.items() if fold(name) in VALUE_KEYS]
        for name, entry in value.items():
            if fold(name) not in VALUE_KEYS:
                _only_words(name, entry)
        value = held[0] if len(held) == 1 else None
    if isinstance(value, str) and (read := cell(value)) is not None:
        return read
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Refused(f"{where}: no score")
    try:
        return float(value), None
    except OverflowError:
        raise Refused(f"{where}: out of range") from None


def _only_words(name: str, value: Any) -> None:
    """Beside scores there may be words; a number or an object there might be a score under another name."""
    if not isinstance(value, str) or cell(value) is not None:
        raise Refused(f"JSON with {name!r}, which is no aspect")
