"""Traffic phases of a moving range: who gets its reads, and when that may change (DESIGN §4.8).

    1  source only     before anything is copied
    2  dual write      writes on the source, mirrored; what a move that is copied is in by itself
    3  dual read       a sample of the reads is made on the target too, and compared
    4  target read     a share of the sessions reads from the target; commits are mirrored before they are acknowledged
    5  target only     the target owns the range: after the cutover

2, 3 and 4 are set while the move is `ready`, each as one change of the route table. 5 is the cutover, and from 5 the
others are the revert. Into 4 it goes in two steps, or a reader could miss what its own client has just written: first
every router mirrors before it acknowledges (4 with a share of nothing), then what was acknowledged before that is
carried over, and only then the target is read from. Out of 4 one step will do: routers go on mirroring first until
each of them has heard that nobody reads the target (`router/epochs.py: MoveFact`).

Gates hold a move in its phase. An operator may force it on; which gates were not met is in the event.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import MappingProxyType

from shardmove.catalog.routers import Traffic
from shardmove.coordinator import preflight
from shardmove.coordinator.cutover import cut_over
from shardmove.coordinator.hold import Hold
from shardmove.domain import points
from shardmove.domain.errors import ConfigurationError, Refused, ShardmoveError
from shardmove.domain.moves import Direction, State

SOURCE_ONLY, DUAL_WRITE, DUAL_READ, TARGET_READ, TARGET_ONLY = 1, 2, 3, 4, 5
SAMPLE_RATE = 0.1
"""The part of the reads that phase 3 compares, unless it is said."""
LAG_PASSES_MAX = 20
NOTHING: Mapping[str, object] = MappingProxyType({})


def check_words(phase: int, *, share: float | None, sample: float | None) -> None:
    """Raises ConfigurationError where share and sample do not go with the phase, or are no parts of a whole."""
    for name, given, its_phase in (("share", share, TARGET_READ), ("sample", sample, DUAL_READ)):
        if given is not None and phase != its_phase:
            raise ConfigurationError(f"a {name} belongs to phase {its_phase}, not to phase {phase}")
        if given is not None and not 0 <= given <= 1:
            raise ConfigurationError(f"a {name} is a part of the whole, between 0 and 1, not {given:g}")


def change_phase(
    hold: Hold, wanted: int, *, share: float | None = None, sample: float | None = None, force: bool = False
) -> None:
    """Brings the move to the phase. Safe to repeat; also to change a share or a sample.

    Raises:
        Refused: the state does not allow it; a gate is not met (unless it is forced); a router does not follow, or
            puts it back to 3 on the way. The phase is what it was, or 3, or, where the way back failed as well, 4 with
            nobody reading from the target.
        ConfigurationError: see `check_words`.
        whatever `cut_over` raises, where the owner changes.
    """
    check_words(wanted, share=share, sample=sample)
    present = hold.catalog.traffic(hold.move.id)
    if wanted == TARGET_ONLY:
        if hold.move.state is not State.SWITCHED:
            unmet = _unmet(hold, present, wanted, force)
            if unmet:
                hold.record("phase_forced", phase=wanted, unmet=unmet)
        cut_over(hold, Direction.FORWARD)
        return
    if wanted == present.phase == SOURCE_ONLY or (wanted == present.phase and hold.move.state is not State.READY):
        return
    if wanted == SOURCE_ONLY:
        raise Refused(
            f"move {hold.move.id} is in phase {present.phase}: the way back to phase 1 is the end of the move",
            hint=f"`shardmove rollback {hold.move.id}`",
        )
    if hold.move.state is State.SWITCHED:
        cut_over(hold, Direction.BACK)
    preflight.require_state(hold.move, State.READY, f"enter phase {wanted}")
    unmet = _unmet(hold, present, wanted, force)
    _enter(hold, wanted, share, sample, unmet)


def _enter(hold: Hold, wanted: int, share: float | None, sample: float | None, unmet: list[str]) -> None:
    """From 2, 3 or 4 to one of them."""
    present = hold.catalog.traffic(hold.move.id)
    detail: dict[str, object] = {"forced": unmet} if unmet else {}
    match wanted:
        case 4:
            _read_target(hold, present, present.read_share or 1.0 if share is None else share, detail)
        case 3:
            _set(hold, present, DUAL_READ, sample=_sample(present) if sample is None else sample, detail=detail)
        case _:
            _set(hold, present, DUAL_WRITE, detail=detail)
    _tell_late(hold)


def _sample(present: Traffic) -> float:
    return present.sample_rate if present.phase == DUAL_READ else SAMPLE_RATE


def _set(
    hold: Hold,
    present: Traffic,
    phase: int,
    *,
    share: float = 0.0,
    sample: float = 0.0,
    detail: Mapping[str, object] = NOTHING,
) -> None:
    if (present.phase, present.read_share, present.sample_rate) == (phase, share, sample):
        hold.progress.step(f"nothing to do: it is in phase {phase} like that")
        return
    hold.catalog.set_phase(
        hold.move.id,
        present.phase,
        phase,
        lease_number=hold.lease.number,
        read_share=share,
        sample_rate=sample,
        detail=detail,
    )


def _read_target(hold: Hold, present: Traffic, share: float, detail: dict[str, object]) -> None:
    """The two steps into phase 4; where the first one fails, the phase is as it was.

    It keeps the sample of phase 3, for when a router puts it back there.
    """
    sample = present.sample_rate
    if present.phase == TARGET_READ and (present.read_share > 0 or share == 0):
        _set(hold, present, TARGET_READ, share=share, sample=sample, detail=detail)
        return
    hold.progress.step("every router mirrors a commit before it acknowledges it")
    if present.phase != TARGET_READ:
        _set(hold, present, TARGET_READ, sample=sample, detail=detail)
    points.reach("phase.before_readers")
    with _undone(hold, present):
        hold.await_routers(f"reading from {hold.move.target}")
        hold.progress.step("carry what was acknowledged before")
        carry_all(hold)
    if share > 0:
        hold.progress.step(f"{share:.0%} of the sessions read from {hold.move.target}")
        # From 4 only: where a router put it back to 3 meanwhile, commits are not mirrored first any more.
        entered = replace(present, phase=TARGET_READ, read_share=0.0)
        _set(hold, entered, TARGET_READ, share=share, sample=sample, detail=detail)


@contextmanager
def _undone(hold: Hold, before: Traffic) -> Iterator[None]:
    """Puts the phase back where the block fails: nobody has read from the target yet."""
    try:
        yield
    except Exception:
        if before.phase != TARGET_READ:
            with suppress(ShardmoveError):  # then it stays in 4 with nobody reading there, which is safe
                now = hold.catalog.traffic(hold.move.id)
                _set(hold, now, before.phase, sample=before.sample_rate, detail={"undone": True})
        raise


def carry_all(hold: Hold) -> None:
    """Everything that was committed before this call is on the target when it returns."""
    with hold.mirror(Direction.FORWARD) as mirror:
        mirror.work_off(hold.config.limits.mirror_rows, check=hold.check)
        mirror.catch_up(full_look=True)


def _tell_late(hold: Hold) -> None:
    """The verb returns once the routers go by the change. Nobody's safety depends on it any more."""
    try:
        hold.await_routers("the phase")
    except Refused as error:
        hold.progress.step(error.message)


# --- gates


def _unmet(hold: Hold, present: Traffic, wanted: int, force: bool) -> list[str]:
    """The gates between the two phases that are not met. Raises Refused where there are any, unless it is forced."""
    unmet = list(gates(hold, present, wanted))
    if unmet and not force:
        raise Refused(
            f"move {hold.move.id} stays in phase {present.phase}: {'; '.join(unmet)}",
            hint=f"wait for it, or `shardmove phase {hold.move.id} {wanted} --force`",
        )
    return unmet


def gates(hold: Hold, present: Traffic, wanted: int) -> Iterator[str]:
    """What keeps the move from going on to that phase, in words. Going back is always allowed."""
    if wanted <= present.phase or hold.move.state is not State.READY:
        return
    limits = hold.config.limits
    if present.phase > DUAL_WRITE and present.age_s < limits.phase_min_s:
        yield f"it has been there for {present.age_s:.0f} s of at least {limits.phase_min_s:g} s"
    tried = present.passes + present.failures
    if present.failures > tried * limits.phase_mirror_errors_max:
        yield f"{present.failures} of {tried} catch-ups of routers failed"
    if present.phase == DUAL_READ and present.differing > present.compared * limits.phase_differences_max:
        yield f"{present.differing} of {present.compared} compared reads differed"
    if wanted == TARGET_READ and present.compared < limits.phase_compared_min:
        yield f"{present.compared} of at least {limits.phase_compared_min} reads were compared in phase 3"
    if wanted in (DUAL_READ, TARGET_READ) and not _is_in_step(hold):
        yield f"no catch-up took less than {limits.phase_lag_ms:g} ms: the mirror lags"


def _is_in_step(hold: Hold) -> bool:
    """Whether the mirror comes near the source within some passes."""
    limits = hold.config.limits
    with hold.mirror(Direction.FORWARD) as mirror:
        for _ in range(LAG_PASSES_MAX):
            done = mirror.catch_up(rows_max=limits.mirror_rows)
            if done.elapsed_s * 1000 < limits.phase_lag_ms and done.keys < limits.mirror_rows:
                return True
            hold.check()
    return False
