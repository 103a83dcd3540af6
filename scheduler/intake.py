"""From a launch request to a session, or to the reason why it can never be one. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from deskfleet.scheduler.policy import Policy
from deskfleet.scheduler.reconcile import Step
from deskfleet.schemas.errors import Reason
from deskfleet.schemas.machine import Machine
from deskfleet.schemas.messages import LaunchRequested, StopRequested
from deskfleet.schemas.session import Event, Outcome, Resources, Session, State


def requested(request: LaunchRequested, wall: float, policy: Policy) -> Session:
    """The queued session that a request asks for; `wall` is UNIX seconds, for display."""
    return Session(
        sid=request.sid,
        user=request.user,
        machine=request.machine,
        resources=request.resources,
        persistent=request.persistent,
        lifetime_s=request.lifetime_s,
        wait_s=request.wait_s,
        groups=request.groups,
        queue_class=policy.class_of(request.user, request.groups),
        created_at=wall,
        changed_at=wall,
    )


def stop_before_launch(request: StopRequested, wall: float) -> Session:
    """An ended session for a stop that overtook its launch: the launch that comes later finds its sid taken."""
    return Session(
        sid=request.sid,
        user=request.actor,
        machine="",
        resources=Resources(0, 0, 0),
        persistent=False,
        lifetime_s=0,
        state=State.ENDED,
        outcome=Outcome.CANCELLED,
        reason=Reason.STOPPED_BY_USER,
        created_at=wall,
        changed_at=wall,
    )


def refuse_launch(session: Session, machines: Mapping[str, Machine], max_lifetime_s: int) -> Step | None:
    """Why this request can never be served, as the step that ends it; None when it may wait for a place.

    The portal has checked the same before: this is the answer to a portal of another version, or a forged message.
    """
    machine = machines.get(session.machine)
    if machine is None:
        return rejection(session, Reason.UNKNOWN_MACHINE, session.machine)
    if not machine.allows(session.user, session.groups):
        return rejection(session, Reason.NOT_ALLOWED, machine.title)
    wrong = machine.problems(session.resources)
    if session.lifetime_s > max_lifetime_s:
        wrong.append(f"lifetime: {session.lifetime_s} s is more than {max_lifetime_s}")
    return rejection(session, Reason.BAD_RESOURCES, "; ".join(wrong)) if wrong else None


def rejection(session: Session, reason: Reason, detail: str) -> Step:
    """The step that ends a request which can never be served."""
    return Step(session, Event.REJECT, Outcome.REJECTED, reason, detail)
