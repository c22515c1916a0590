"""Each rule of an owner, and of a trainer, by name."""

import pickle

import pytest

from shardemb.protocol import messages as say
from shardemb.protocol.era import Owner, Trainer

HEAD = "head"
ERA, NEXT = (1, "c", 1), (1, "c", 2)
START = (0, None)
FIRST, SECOND = (1, (1, "c", 1)), (1, (1, "c", 2))
ANN, BOB = ("ann", "life 1"), ("bob", "life 1")


def owner(last=START, prepared=None):
    return Owner(2, "i", (HEAD, 2, 4), say.Status(last, prepared))


def serving(**status):
    """An owner that serves `ERA`, at `START` or `last`."""
    it = owner(**status)
    it.handle(say.Claim(ERA))
    it.handle(say.Begin(ERA, status.get("last", START)))
    assert it.era == ERA
    return it


def reply(kind, *fields, **more):
    return say.Reply(kind(2, "i", *fields, **more))


def yes(attempt):
    return reply(say.Vote, attempt, yes=True)


def images(attempt):
    return say.PrepareImages(attempt, None, {})


def refused(effects, request):
    """Whether nothing else is to be done than to refuse the request."""
    return [type(effect) for effect in effects] == [say.Reply] and (
        isinstance(effects[0].answer, say.Refused) and effects[0].answer.request == request
    )


def change(number, trainer=ANN, era=ERA, after=None):
    return say.Change(era, trainer, number, number - 1 if after is None else after, "a change")


def prepared_owner():
    it = serving()
    it.handle(change(1))
    prepare = say.Prepare(ERA, FIRST, ((ANN, 1),), START)
    assert it.handle(prepare) == (images(FIRST), yes(FIRST))
    return it, prepare


def test_it_says_which_partition_it_has_without_changing_anything():
    status = say.Status(START, FIRST)
    assert owner(prepared=FIRST).handle(say.Who()) == (reply(say.Present, (HEAD, 2, 4), status),)


# ---- C1, C2: coordinators


def test_c1_the_highest_coordinator_is_obeyed():
    it = owner()
    assert it.handle(say.Claim((2, "b", 1))) == (reply(say.Claimed, (2, "b", 1), say.Status(START)),)
    for lower in (1, "c", 9), (2, "a", 9), (2, "b", 0):
        assert it.handle(say.Claim(lower)) == (reply(say.Outbid, lower, (2, "b", 1)),)
        assert refused(it.handle(say.Begin(lower, START)), say.Begin(lower, START))
    assert it.handle(say.Claim((2, "c", 1))) == (reply(say.Claimed, (2, "c", 1), say.Status(START)),)


def test_c1_a_claimed_owner_serves_nothing_of_an_older_era():
    it = serving()
    it.handle(say.Claim(NEXT))
    for request in change(1), say.Read(ERA), say.Prepare(ERA, FIRST, (), START), say.Decide(ERA, FIRST):
        assert refused(it.handle(request), request)


def test_c1_the_claim_that_began_the_era_does_not_end_it_when_it_comes_again():
    it = serving()
    it.handle(say.Claim(ERA))
    assert it.era == ERA


def test_c2_the_answer_to_a_claim_says_what_is_so_then():
    it, _ = prepared_owner()
    assert it.handle(say.Claim(NEXT)) == (reply(say.Claimed, NEXT, say.Status(START, FIRST)),)


# ---- E1, E2, P5, S1: eras


def test_e1_requests_of_other_eras_are_refused():
    it = serving()
    for era in (1, "c", 0), NEXT:
        for request in (
            change(1, era=era), say.Read(era), say.Prepare(era, FIRST, (), START),
            say.Decide(era, FIRST), say.Abort(era, FIRST),
        ):  # fmt: skip
            assert refused(it.handle(request), request)
    assert it.handle(say.Read(ERA, "rows")) == (say.Serve(say.Read(ERA, "rows")),)


def test_e2_the_first_begin_opens_and_later_ones_roll_back():
    it = owner()
    it.handle(say.Claim(ERA))
    assert it.handle(say.Begin(ERA, START)) == (say.Open(START), reply(say.Begun, ERA))
    it.handle(change(1))
    it.handle(say.Claim(NEXT))
    assert it.handle(say.Begin(NEXT, START)) == (say.Rollback(), reply(say.Begun, NEXT))
    assert it.cut == ()


def test_e2_the_same_begin_again_does_nothing():
    it = serving()
    it.handle(change(1))
    assert it.handle(say.Begin(ERA, START)) == (reply(say.Begun, ERA),)
    assert it.cut == ((ANN, 1),)


@pytest.mark.parametrize(("decided", "kept"), [(FIRST, say.DecideImages()), (START, say.AbandonImages())])
def test_p5_begin_commits_the_very_attempt_and_drops_any_other(decided, kept):
    it, _ = prepared_owner()
    it.handle(say.Claim(NEXT))
    assert it.handle(say.Begin(NEXT, decided)) == (kept, say.Rollback(), reply(say.Begun, NEXT))
    assert it.status == say.Status(decided)


@pytest.mark.parametrize("decided", [FIRST, START])
def test_p5_an_owner_that_comes_up_in_doubt_decides_nothing(decided):
    it = owner(prepared=FIRST)
    it.handle(say.Claim(ERA))
    assert it.status == say.Status(START, FIRST)
    assert it.handle(say.Begin(ERA, decided)) == (say.Open(decided), reply(say.Begun, ERA))
    assert it.status == say.Status(decided)


@pytest.mark.parametrize("decided", [SECOND, (2, (1, "c", 3)), (0, (1, "c", 1))])
def test_s1_a_begin_at_another_commit_is_refused_and_changes_nothing(decided):
    it = owner(prepared=FIRST)
    it.handle(say.Claim(ERA))
    assert refused(it.handle(say.Begin(ERA, decided)), say.Begin(ERA, decided))
    assert (it.status, it.era) == (say.Status(START, FIRST), None)


# ---- P1, P2, P4, P5: commits


def test_p1_the_same_prepare_again_gets_the_same_vote():
    it, prepare = prepared_owner()
    assert it.handle(prepare) == (yes(FIRST),)
    wrong = say.Prepare(ERA, SECOND, (), START)
    *_, first = it.handle(wrong)
    assert it.handle(wrong) == (first,)
    assert not first.answer.yes


@pytest.mark.parametrize("cut", [(), ((ANN, 2),), ((ANN, 1), (BOB, 1)), ((("ann", "life 2"), 1),)])
def test_p1_it_votes_no_on_another_cut(cut):
    it = serving()
    it.handle(change(1))
    (vote,) = it.handle(say.Prepare(ERA, FIRST, cut, START))
    assert not vote.answer.yes
    assert "changes" in vote.answer.why
    assert it.status.prepared is None


@pytest.mark.parametrize("attempt", [(2, (1, "c", 2)), (0, (1, "c", 2)), (1, None)])
def test_p1_only_the_next_commit_is_prepared(attempt):
    it, prepare = serving(), say.Prepare(ERA, attempt, (), START)
    assert refused(it.handle(prepare), prepare)


def test_p1_an_attempt_that_comes_late_is_refused():
    it = serving()
    assert it.handle(say.Prepare(ERA, SECOND, (), START)) == (images(SECOND), yes(SECOND))
    it.handle(say.Abort(ERA, SECOND))
    late = say.Prepare(ERA, FIRST, (), START)
    assert refused(it.handle(late), late)


def test_p1_a_prepare_says_what_was_decided_before():
    it, _ = prepared_owner()
    then = (2, (1, "c", 2))
    effects = it.handle(say.Prepare(ERA, then, ((ANN, 1),), FIRST, 7, {"a": 1}))
    assert effects == (say.DecideImages(), say.PrepareImages(then, 7, {"a": 1}), yes(then))
    assert it.status == say.Status(FIRST, then)


@pytest.mark.parametrize("cut", [((ANN, 1),), ()])
def test_p5_a_newer_attempt_drops_the_one_before_also_if_the_vote_is_no(cut):
    it, _ = prepared_owner()
    abandoned, *_ = it.handle(say.Prepare(ERA, SECOND, cut, START))
    assert abandoned == say.AbandonImages()
    assert it.status.prepared == (SECOND if cut else None)


def test_p2_changes_wait_for_the_decision_and_reads_do_not():
    it, _ = prepared_owner()
    assert it.handle(change(2)) == (say.Wait(change(2)),)
    assert it.handle(say.Read(ERA)) == (say.Serve(say.Read(ERA)),)
    assert it.handle(change(1)) == (reply(say.Applied, ERA, ANN, 1),)
    it.handle(say.Decide(ERA, FIRST))
    assert it.handle(change(2)) == (say.Apply(change(2)), reply(say.Applied, ERA, ANN, 2))


def test_p4_a_decision_is_taken_once():
    it, _ = prepared_owner()
    assert it.handle(say.Decide(ERA, FIRST)) == (say.DecideImages(), reply(say.Told, FIRST))
    assert it.handle(say.Decide(ERA, FIRST)) == (reply(say.Told, FIRST),)
    assert it.status == say.Status(FIRST)


def test_p5_a_decision_on_another_attempt_of_the_same_number_is_refused():
    it, _ = prepared_owner()
    assert refused(it.handle(say.Decide(ERA, SECOND)), say.Decide(ERA, SECOND))
    assert it.status == say.Status(START, FIRST)


def test_an_abort_drops_this_very_attempt():
    it, _ = prepared_owner()
    assert it.handle(say.Abort(ERA, SECOND)) == (reply(say.Told, SECOND),)
    assert it.handle(say.Abort(ERA, FIRST)) == (say.AbandonImages(), reply(say.Told, FIRST))
    assert it.handle(say.Abort(ERA, FIRST)) == (reply(say.Told, FIRST),)
    assert it.status == say.Status(START)


def test_a_partition_that_cannot_prepare_votes_no_and_goes_on():
    it, prepare = prepared_owner()
    no = reply(say.Vote, FIRST, yes=False, why="no space")
    assert it.fail_to_prepare("no space") == (no,)
    assert it.handle(prepare) == (no,)
    assert it.handle(change(2))[0] == say.Apply(change(2))
    with pytest.raises(ValueError, match="nothing is prepared"):
        it.fail_to_prepare("again")


# ---- E4, E5: changes


def test_e4_a_change_is_made_once_and_in_order_and_acknowledged_again():
    it = serving()
    assert refused(it.handle(change(2)), change(2))
    assert it.handle(change(1)) == (say.Apply(change(1)), reply(say.Applied, ERA, ANN, 1))
    assert it.handle(change(1)) == (reply(say.Applied, ERA, ANN, 1),)
    it.handle(change(1, BOB))
    it.handle(change(2))
    assert it.cut == ((ANN, 2), (BOB, 1))


def test_e5_a_trainer_that_was_started_again_needs_a_new_era():
    it, again = serving(), ("ann", "life 2")
    it.handle(change(1))
    assert refused(it.handle(change(1, again)), change(1, again))
    it.handle(say.Claim(NEXT))
    it.handle(say.Begin(NEXT, START))
    assert it.handle(change(1, again, NEXT))[0] == say.Apply(change(1, again, NEXT))


def test_a_change_that_the_store_refused_is_taken_back():
    it = serving()
    for number in 1, 2:
        it.handle(change(number))
    it.take_back(change(2))
    assert it.cut == ((ANN, 1),)
    with pytest.raises(ValueError, match="not the last"):
        it.take_back(change(2))
    it.take_back(change(1))
    assert it.cut == ()


def test_a_change_that_was_taken_back_everywhere_leaves_its_number_free():
    it = serving()
    it.handle(change(1))
    assert refused(it.handle(change(3, after=2)), change(3, after=2))
    assert it.handle(change(3, after=1))[0] == say.Apply(change(3, after=1))
    assert it.handle(change(2)) == (reply(say.Applied, ERA, ANN, 2),)  # late: it is not made
    it.take_back(change(3, after=1))
    assert it.cut == ((ANN, 1),)


def test_a_change_that_was_taken_back_and_still_arrives_ends_the_era():
    it = serving()
    it.handle(change(1))
    assert refused(it.handle(change(2, after=0)), change(2, after=0))


# ---- trainers


def test_a_trainer_makes_one_change_at_a_time():
    it = Trainer(ANN, ERA, 2)
    assert it.change("x") == say.Change(ERA, ANN, 1, 0, "x")
    it.handle(say.Applied(0, "i", ERA, ANN, 1))
    assert (it.waiting, it.made) == ({1}, 0)
    with pytest.raises(RuntimeError, match="not made"):
        it.change("y")
    it.handle(say.Applied(1, "i", ERA, BOB, 1))
    it.handle(say.Applied(1, "i", NEXT, ANN, 1))
    assert it.made == 0
    it.handle(say.Applied(1, "i", ERA, ANN, 1))
    assert it.made == 1
    assert it.change("y").number == 2


def test_a_trainer_takes_back_what_all_have_refused():
    it = Trainer(ANN, ERA, 2)
    it.change("x")
    it.take_back()
    it.handle(say.Applied(0, "i", ERA, ANN, 1))  # of a message that came twice
    assert it.made == 0
    assert it.change("y") == say.Change(ERA, ANN, 2, 0, "y")
    it.handle(say.Applied(0, "i", ERA, ANN, 2))
    with pytest.raises(RuntimeError, match="some partitions"):
        it.take_back()
    it.handle(say.Applied(1, "i", ERA, ANN, 2))
    assert it.made == 2


def test_a_trainer_ends_with_its_era():
    it = Trainer(ANN, ERA, 2)
    it.handle(say.Refused(0, "i", say.Read(NEXT), "another era"))
    assert it.ended is None
    it.handle(say.Refused(0, "i", say.Read(ERA), "the era is over"))
    with pytest.raises(RuntimeError, match="the era is over"):
        it.change("x")


# ---- messages


def test_messages_can_be_sent():
    it, prepare = prepared_owner()
    for each in (prepare, *it.handle(prepare), *it.handle(change(9)), say.Status(START, FIRST)):
        assert pickle.loads(pickle.dumps(each)) == each
