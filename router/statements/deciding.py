"""Where one execution of a planned statement goes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from router.statements.actions import (
    NOT_SUPPORTED,
    Action,
    Arguments,
    Decision,
    Facts,
    Hint,
    Merge,
    Origin,
    Part,
    Planned,
    Refusal,
    Term,
    View,
)
from router.statements.values import Unreadable, keys_of
from shardmove.domain.errors import ShardmoveError
from shardmove.domain.keys import KeyType
from shardmove.domain.routes import Route

_NO_FACTS = Facts()


def decide(planned: Planned, arguments: Arguments | None, view: View, facts: Facts = _NO_FACTS) -> Decision:
    """Never raises for what a client sent: what cannot be decided is refused.

    Of a text of several statements all go to one server: the decision is then the one that suits them all, and
    `Decision.part` is None.
    """
    parts = planned.plan.parts
    try:
        if len(parts) == 1:
            return _decide(parts[0], planned, arguments, view, facts)
        return _decide_script(planned, arguments, view, facts)
    except Unreadable as error:
        return Decision(Action.REFUSED, refusal=error.refusal)
    except (KeyError, ShardmoveError):
        refusal = Refusal("57P03", "the router has no routes yet of a keyspace that the statement names")
        return Decision(Action.REFUSED, refusal=refusal)


def _decide(part: Part, planned: Planned, arguments: Arguments | None, view: View, facts: Facts) -> Decision:
    action = part.action
    if action is Action.KEYED:
        hint = part.hint or facts.hint
        if hint is None:
            return _keyed(part, planned, arguments, view, facts)
        return _hinted(part, hint, view)
    return _others(part, planned, arguments, view, facts)


def _keyed(part: Part, planned: Planned, arguments: Arguments | None, view: View, facts: Facts) -> Decision:
    tables, table = view.tables.keyspaces, view.routes.keyspaces
    routes: list[Route] = []
    for keys in part.keys:
        keyspace, at = tables[keys.keyspace], table[keys.keyspace].at
        for term in keys.terms:
            for key in keys_of(term, keyspace.key_type, planned.literals, arguments, facts, keys.is_assigned):
                route = at(keyspace.place(key))
                if route not in routes:
                    routes.append(route)
    if len(routes) == 1:
        shards: tuple[str, ...] = (routes[0].shard,)
    else:
        shards = tuple(dict.fromkeys([route.shard for route in routes]))
        if len(shards) > 1:
            if part.needs_home and not part.is_write:
                return _refused(part, _apart(view.home))
            return _on_several(part, shards, routes, planned, arguments, facts)
    if part.needs_home and shards != (view.home,):
        if shards:
            return _refused(part, _apart(view.home))
        shards = (view.home,)
    return Decision(Action.KEYED, shards, tuple(routes), part.is_write, part.locks_rows, None, None, part)


def _on_several(
    part: Part,
    shards: tuple[str, ...],
    routes: Sequence[Route],
    planned: Planned,
    arguments: Arguments | None,
    facts: Facts,
) -> Decision:
    if part.is_write:
        return _refused(
            part,
            Refusal(
                NOT_SUPPORTED,
                f"the statement writes rows of several shards ({', '.join(shards)})",
                "write the rows of each shard in a statement of their own; a key that changes must stay on its shard",
            ),
        )
    if part.obstacle is not None:
        return _refused(part, part.obstacle)
    return Decision(Action.SCATTER, shards, tuple(routes), merge=_merge(part, planned, arguments, facts), part=part)


def _hinted(part: Part, hint: Hint, view: View) -> Decision:
    """The client's own word goes before what the statement says."""
    keyspaces = view.tables.keyspaces
    name = hint.keyspace or (part.keyspaces[0] if len(set(part.keyspaces)) == 1 else None)
    if name is None and len(keyspaces) == 1:
        name = next(iter(keyspaces))
    if name is None or name not in keyspaces:
        why = f"there is no keyspace {name}" if name else "the hint does not say which keyspace its key is of"
        return _refused(part, Refusal("22023", why, f"SET shardmove.keyspace: {', '.join(sorted(keyspaces))}"))
    try:
        key = keyspaces[name].key_type.parse(hint.key)
    except ShardmoveError as error:
        return _refused(part, Refusal("22023", error.message, error.hint))
    route = view.routes[name].at(keyspaces[name].place(key))
    if part.needs_home and route.shard != view.home:
        return _refused(part, _apart(view.home))
    action = part.action if part.action in _KEEP_ACTION else Action.KEYED
    return Decision(action, (route.shard,), (route,), part.is_write, part.locks_rows, part=part, is_hinted=True)


_KEEP_ACTION = frozenset({Action.COPY_IN, Action.COPY_OUT, Action.EXPLAIN, Action.DECLARE})
_EVERYWHERE = frozenset({Action.DDL, Action.REFERENCE_WRITE})
_FOLLOWS_HINT = frozenset({Action.KEYED, Action.SCATTER, Action.HOME, Action.REFERENCE_READ, *_KEEP_ACTION})


def _others(part: Part, planned: Planned, arguments: Arguments | None, view: View, facts: Facts) -> Decision:
    hint = part.hint or facts.hint
    is_led = part.action in _FOLLOWS_HINT or (part.refusal is not None and part.keyspaces)
    if hint is not None and is_led and not _writes_everywhere(part):
        return _hinted(part, hint, view)
    if part.refusal is not None:
        return _refused(part, part.refusal)
    match part.action:
        case Action.HOME:
            return Decision(part.action, (view.home,), is_write=part.is_write, locks_rows=part.locks_rows, part=part)
        case Action.SCATTER:
            return _scattered(part, planned, arguments, view, facts)
        case Action.DDL | Action.REFERENCE_WRITE:
            return Decision(part.action, tuple(view.shards), is_write=True, part=part)
        case Action.EXPLAIN | Action.DECLARE:
            return _of_inner(part, planned, arguments, view, facts)
        case Action.COPY_IN | Action.COPY_OUT:
            return _copy(part, planned, arguments, view, facts)
        case Action.SET:
            return _set(part, arguments)
        case _:
            return Decision(part.action, is_write=part.is_write, part=part, stays=part.stays)


def _writes_everywhere(part: Part) -> bool:
    """It writes what every shard holds whole: no key leads it to one of them."""
    if part.inner is not None:
        return part.is_write and part.inner.action in _EVERYWHERE
    return part.action is Action.COPY_IN and bool(part.tables) and not part.keyspaces


def _scattered(part: Part, planned: Planned, arguments: Arguments | None, view: View, facts: Facts) -> Decision:
    routes = tuple(route for name in dict.fromkeys(part.keyspaces) for route in view.routes[name].routes)
    shards = tuple(dict.fromkeys(route.shard for route in routes))
    if len(shards) == 1 and not (part.needs_home and shards[0] != view.home):
        return Decision(Action.KEYED, shards, routes, part.is_write, part.locks_rows, part=part)
    if part.needs_home:
        return _refused(part, _apart(view.home))
    if part.obstacle is not None:
        return _refused(part, part.obstacle)
    return Decision(part.action, shards, routes, merge=_merge(part, planned, arguments, facts), part=part)


def _of_inner(part: Part, planned: Planned, arguments: Arguments | None, view: View, facts: Facts) -> Decision:
    assert part.inner is not None
    decision = _decide(part.inner, planned, arguments, view, facts)
    if decision.refusal is not None:
        return decision
    if part.action is Action.DECLARE and len(decision.shards) > 1:
        return _refused(
            part, Refusal(NOT_SUPPORTED, "a cursor reads from one shard", "name the key in the cursor's statement")
        )
    is_write = decision.is_write and (part.action is not Action.EXPLAIN or part.is_write)
    if is_write and len(decision.shards) > 1:
        what = "EXPLAIN ANALYZE" if part.action is Action.EXPLAIN else "COPY"
        refusal = Refusal(NOT_SUPPORTED, f"{what} of a write for every shard is not routed", "send the write by itself")
        return _refused(part, refusal)
    return decision._replace(action=part.action, part=part, is_write=is_write)


def _copy(part: Part, planned: Planned, arguments: Arguments | None, view: View, facts: Facts) -> Decision:
    if part.inner is not None:
        decision = _of_inner(part, planned, arguments, view, facts)
        merge = decision.merge
        if len(decision.shards) > 1 and (part.obstacle is not None or (merge is not None and merge != Merge())):
            return _refused(part, part.obstacle or Refusal(NOT_SUPPORTED, "COPY of ordered rows from several shards"))
        return decision
    if part.copy is not None:  # the rows say where they go
        return Decision(part.action, is_write=True, part=part)
    if part.keyspaces:
        return _scattered(part, planned, arguments, view, facts)._replace(action=part.action)
    if part.tables:
        shards = tuple(view.shards) if part.is_write else ()
        return Decision(part.action, shards, is_write=part.is_write, part=part)
    return Decision(part.action, (view.home,), is_write=part.is_write, part=part)


def _decide_script(planned: Planned, arguments: Arguments | None, view: View, facts: Facts) -> Decision:
    """All statements of one simple query go to one server, unless all of them go to every shard."""
    decisions = [_decide(part, planned, arguments, view, facts) for part in planned.plan.parts]
    for decision in decisions:
        if decision.refusal is not None:
            return decision
        if decision.action is Action.COPY_IN and not decision.shards and len(view.shards) > 1:
            return Decision(Action.REFUSED, is_write=True, refusal=_COPY_IN_SCRIPT)
    placed = [decision for decision in decisions if decision.shards]
    shards = tuple(dict.fromkeys(shard for decision in placed for shard in decision.shards))
    routes = tuple(dict.fromkeys(route for decision in placed for route in decision.routes))
    is_write = any(decision.is_write for decision in decisions)
    locks_rows = any(decision.locks_rows for decision in decisions)
    if not placed:
        return Decision(Action.FREE, is_write=is_write)
    if len(shards) == 1:
        is_home = all(decision.action is Action.HOME for decision in placed)
        is_hinted = any(decision.is_hinted for decision in placed)
        action = Action.HOME if is_home else Action.KEYED
        return Decision(action, shards, routes, is_write, locks_rows, is_hinted=is_hinted)
    if all(decision.action in _EVERYWHERE for decision in placed):
        if len(placed) == len(decisions):
            return Decision(Action.DDL, shards, is_write=True)
        return Decision(Action.REFUSED, is_write=True, refusal=_EVERYWHERE_BESIDE)
    refusal = Refusal(
        NOT_SUPPORTED,
        f"the statements of one query go to several shards ({', '.join(shards)})",
        "send them one by one",
    )
    return Decision(Action.REFUSED, refusal=refusal)


_EVERYWHERE_BESIDE: Final = Refusal(
    NOT_SUPPORTED,
    "statements for every shard beside others in one query are not routed",
    "send them by themselves, without BEGIN and COMMIT: each shard runs them in a transaction of its own",
)
_COPY_IN_SCRIPT: Final = Refusal(
    NOT_SUPPORTED,
    "COPY into a split table beside other statements is not routed: its rows say where it goes",
    "send it by itself",
)


def execute_arguments(planned: Planned, part: Part, types: Sequence[int] = ()) -> Arguments | None:
    """What EXECUTE hands to a statement that PREPARE made with these types, as a Bind would; None: no constants."""
    values: list[bytes | None] = []
    for term in part.arguments:
        if term is None or term.origin is Origin.PARAMETER:
            return None
        if term.origin is Origin.NULL:
            values.append(None)
            continue
        literal = planned.literals[term.index]
        if literal.kind == "o" or (literal.kind == "n" and not _PLAIN_NUMBER.fullmatch(literal.text)):
            return None
        values.append((("-" if term.is_negative else "") + literal.text).encode("utf-8", "surrogateescape"))
    return Arguments((), values, [*types, *([0] * (len(values) - len(types)))])


_PLAIN_NUMBER: Final = re.compile(r"0|[1-9][0-9]*")
"""One that is the same text as a number and as a string."""


def _set(part: Part, arguments: Arguments | None) -> Decision:
    value = _text(part.value, part.value_term, arguments)
    if part.name_term is not None:
        name = _text(None, part.name_term, arguments)
        part, value = replace(part, name=(name or "").lower()), None if name is None else value
    return Decision(part.action, part=part, value=value)


def _text(text: str | None, term: Term | None, arguments: Arguments | None) -> str | None:
    if term is None:
        return text
    if arguments is None or term.index >= len(arguments.values):
        raise Unreadable(Refusal("42P02", f"there is no parameter ${term.index + 1}"))
    data = arguments.values[term.index]
    return None if data is None else data.decode("utf-8", "surrogateescape")


def _merge(part: Part, planned: Planned, arguments: Arguments | None, facts: Facts) -> Merge:
    plan = part.merge
    return Merge(plan.order, None if plan.limit is None else _limit(plan.limit, planned, arguments, facts))


def _limit(term: Term, planned: Planned, arguments: Arguments | None, facts: Facts) -> int | None:
    keys = keys_of(term, KeyType.BIGINT, planned.literals, arguments, facts, True)
    return int(str(keys[0])) if keys else None


def _apart(home: str) -> Refusal:
    return Refusal(
        NOT_SUPPORTED,
        "the statement names split tables together with tables of no keyspace, which are on another shard",
        f"tables of no keyspace are on {home}; make them reference tables, or read them in a statement of their own",
    )


def _refused(part: Part, refusal: Refusal) -> Decision:
    return Decision(Action.REFUSED, is_write=part.is_write, refusal=refusal, part=part)
