"""Each rule of the coordinator, by name."""

import pytest

from shardemb.protocol import messages as say
from shardemb.protocol.coordination import Coordinator

HEAD, PARTS = "head", 3
START = (0, None)
ATTEMPT = (1, (1, "c", 1))
CUT = ((("ann", "life"), 1),)


def identity(part):
    return HEAD, part, PARTS


def coordinator(decided=START, epoch=0):
    it = Coordinator(HEAD, PARTS, "c", epoch, decided)
    assert it.start() == (say.WriteHead(epoch + 1, decided),)
    return it


def present(it, *statuses, incarnation="i"):
    """Have owners come; return the effects of the last one."""
    effects = ()
    for part, status in enumerate(statuses):
        effects = it.handle(say.Present(part, incarnation, identity(part), status))
    return effects


def claimed(it, *statuses, present_as=None):
    """Have owners with these statuses claimed; return the effects of the last answer."""
    present(it, *(present_as or statuses))
    assert isinstance(it.request, say.Claim)
    effects = ()
    for part, status in enumerate(statuses):
        effects = it.handle(say.Claimed(part, "i", it.era, status))
    return effects


def serving(decided=START):
    it = coordinator(decided)
    claimed(it, *[say.Status(decided)] * PARTS)
    effects = [it.handle(say.Begun(part, "i", it.era)) for part in range(PARTS)]
    assert effects == [(), (), (say.Served(it.era, decided),)]
    assert it.serving
    return it


def to_all(request):
    return tuple(say.Send(part, "i", request) for part in range(PARTS))


def preparing():
    it = serving()
    assert it.commit(it.era, CUT, 5, {"a": 1}) == to_all(
        say.Prepare(it.era, ATTEMPT, CUT, START, 5, {"a": 1})
    )
    return it


def vote(it, part, attempt=ATTEMPT, yes=True, incarnation="i"):
    return it.handle(say.Vote(part, incarnation, attempt, yes=yes, why="" if yes else "no"))


# ---- C1, C2, C3, S1: who is there, and which commit is the last


def test_c1_it_claims_when_all_are_present():
    it = coordinator(epoch=4)
    assert it.missing == (0, 1, 2)
    effects = present(it, *[say.Status(START)] * PARTS)
    assert it.era[:2] == (5, "c")
    assert effects == to_all(say.Claim(it.era))
    assert (it.missing, it.waiting, it.serving) == ((), (0, 1, 2), False)


def test_c1_an_outbid_coordinator_stops_or_outbids():
    it = preparing()
    it.end(it.era, "a trainer was lost")
    later = (7, "d", 1)
    assert it.handle(say.Outbid(1, "i", it.era, later)) == (say.Overtaken(later),)
    assert (it.again(), it.serving) == ((), False)
    written, *sends = it.outbid(later)
    assert written == say.WriteHead(8, START)
    assert tuple(sends) == to_all(say.Claim(it.era))
    assert it.era > later
    assert it.outbid(later) == ()


def test_c2_only_the_answer_to_the_claim_counts():
    it = coordinator()
    prepared = say.Status(START, ATTEMPT)
    effects = claimed(it, *[prepared] * PARTS, present_as=[say.Status(START)] * PARTS)
    assert effects[0] == say.WriteHead(1, ATTEMPT)


def test_c3_what_all_have_prepared_is_decided_and_written_to_the_head_first():
    it = coordinator()
    effects = claimed(it, *[say.Status(START, ATTEMPT)] * PARTS)
    assert effects == (say.WriteHead(1, ATTEMPT), *to_all(say.Begin(it.era, ATTEMPT)))


OTHER = (1, (1, "c", 2))


@pytest.mark.parametrize("third", [None, OTHER])
def test_c3_anything_else_that_is_prepared_is_dead(third):
    it = coordinator()
    effects = claimed(it, *[say.Status(START, ATTEMPT)] * 2, say.Status(START, third))
    assert effects == to_all(say.Begin(it.era, START))


def test_c3_a_head_that_is_behind_follows_the_partitions():
    newer, newest = (4, (1, "b", 9)), (5, (1, "b", 10))
    it = coordinator(decided=(2, (1, "b", 2)))
    effects = claimed(it, say.Status(newer, newest), say.Status(newest), say.Status(newer, newest))
    assert effects == (say.WriteHead(1, newest), *to_all(say.Begin(it.era, newest)))


def test_c3_a_head_that_is_ahead_is_followed():
    it = coordinator(decided=ATTEMPT)
    effects = claimed(it, say.Status(ATTEMPT), *[say.Status(START, ATTEMPT)] * 2)
    assert effects == to_all(say.Begin(it.era, ATTEMPT))


@pytest.mark.parametrize(
    "status", [say.Status((1, (1, "c", 9))), say.Status(START), say.Status(START, OTHER)]
)
def test_s1_a_partition_at_another_commit_is_refused(status):
    it = coordinator(decided=ATTEMPT)
    (refused,) = it.handle(say.Present(1, "i", identity(1), status))
    assert (refused.part, it.missing) == (1, (0, 1, 2))
    assert str(status) in refused.why


@pytest.mark.parametrize("which", [None, ("another", 1, PARTS), (HEAD, 2, PARTS), (HEAD, 1, PARTS + 1)])
def test_s1_a_partition_of_another_place_is_refused(which):
    it = coordinator()
    (refused,) = it.handle(say.Present(1, "i", which, say.Status(START)))
    assert str(which) in refused.why
    assert it.missing == (0, 1, 2)


def test_s1_a_partition_that_turns_out_to_be_old_is_refused_by_name():
    newer = (4, (1, "b", 9))
    it = coordinator()
    (refused,) = claimed(it, say.Status(newer), say.Status(START), say.Status(newer))
    assert isinstance(refused, say.RefusedPartition)
    assert (refused.part, it.missing, it.decided) == (1, (1,), START)


# ---- E2, E3: eras


def test_e2_another_incarnation_begins_an_era():
    it = preparing()
    before = it.era
    failed, *sends = it.handle(say.Present(2, "j", identity(2), say.Status(START)))
    assert failed == say.CommitFailed(before, "partition 2 has another owner")
    assert it.era > before
    assert {send.incarnation for send in sends} == {"i", "j"}
    assert it.handle(say.Present(2, "j", identity(2), say.Status(START))) == ()


def test_e2_a_lost_owner_ends_the_era():
    it = serving()
    before = it.era
    assert it.lose(1, "another incarnation", "gone") == ()
    assert it.lose(1, "i", "gone") == ()
    assert (it.missing, it.serving) == ((1,), False)
    assert it.era > before
    assert it.lose(1, "i", "gone") == ()


def test_e2_a_lost_trainer_ends_its_era_only():
    it = serving()
    before = it.era
    assert it.end((1, "c", 0), "a trainer was lost") == ()
    assert it.end(before, "a trainer was lost") == to_all(say.Claim(it.era))
    assert it.era > before


def test_e3_a_commit_of_another_era_fails():
    it = serving()
    before = it.era
    it.end(before, "a trainer was lost")
    assert it.commit(before, CUT) == (say.CommitFailed(before, f"the era {before} is over"),)
    assert isinstance(it.commit(it.era, CUT)[0], say.CommitFailed)  # it has not begun yet


# ---- P1, P3, P5: commits


def test_p3_the_votes_of_all_are_the_commit_once_the_head_has_it():
    it = preparing()
    assert (vote(it, 0), vote(it, 1), vote(it, 1)) == ((), (), ())
    assert vote(it, 2) == (
        say.WriteHead(1, ATTEMPT),
        say.Committed(it.era, ATTEMPT),
        *to_all(say.Decide(it.era, ATTEMPT)),
    )
    assert it.decided == ATTEMPT
    assert not it.preparing


@pytest.mark.parametrize(("attempt", "incarnation"), [(OTHER, "i"), (ATTEMPT, "h")])
def test_p3_other_votes_do_not_count(attempt, incarnation):
    it = preparing()
    vote(it, 0)
    vote(it, 1)
    assert vote(it, 2, attempt, incarnation=incarnation) == ()
    assert it.preparing


def test_a_vote_of_no_aborts():
    it = preparing()
    vote(it, 0)
    assert vote(it, 1, yes=False) == (say.CommitFailed(it.era, "no"), *to_all(say.Abort(it.era, ATTEMPT)))
    assert vote(it, 2) == ()
    assert it.decided == START


def test_no_attempt_is_made_twice():
    it = preparing()
    assert it.commit(it.era, CUT) == (say.CommitFailed(it.era, "another commit is under way"),)
    it.give_up("enough")
    assert it.give_up("enough") == ()
    assert it.commit(it.era, CUT)[0].request.attempt == OTHER


def test_p1_a_prepare_names_the_last_commit_also_to_whom_was_not_told():
    it = preparing()
    for part in range(PARTS):
        vote(it, part)
    request = it.commit(it.era, CUT)[0].request
    assert (request.decided, request.attempt) == (ATTEMPT, (2, (1, "c", 2)))


def test_again_asks_who_has_not_answered():
    it = coordinator()
    assert it.again() == ()
    it = preparing()
    vote(it, 1)
    assert [send.part for send in it.again()] == [0, 2]
    vote(it, 0)
    vote(it, 2)
    for part in range(PARTS):
        assert it.waiting == tuple(range(part, PARTS))
        it.handle(say.Told(part, "i", ATTEMPT))
    assert it.again() == ()


def test_an_owner_that_refuses_what_it_is_asked_is_lost():
    it = preparing()
    before = it.era
    assert it.handle(say.Refused(1, "i", say.Decide(before, OTHER), "late")) == ()
    (failed,) = it.handle(say.Refused(1, "i", it.request, "another era"))
    assert failed == say.CommitFailed(before, "the owner of partition 1 was lost: another era")
    assert it.missing == (1,)


def test_late_answers_are_nothing():
    it = preparing()
    for answer in (
        say.Begun(0, "i", it.era),
        say.Claimed(0, "i", it.era, say.Status(START)),
        say.Told(0, "i", ATTEMPT),
        say.Outbid(0, "i", it.era, (9, "z", 1)),
        say.Applied(0, "i", it.era, ("ann", "life"), 1),
    ):
        assert it.handle(answer) == ()
    assert it.waiting == (0, 1, 2)
