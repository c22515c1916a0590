import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shardemb.memory.slots import CHANGED, DIRTY, FOLDING, TOUCHED, UNFOLDED, USED, Slots

CAPACITY = 200


def int64(values):
    return np.array(list(values), np.int64)


events = st.lists(
    st.one_of(
        st.tuples(st.just("allocate"), st.integers(0, 30)),
        st.tuples(
            st.sampled_from(["free", "mark_dirty", "mark_changed", "mark_touched"]),
            st.randoms(use_true_random=False),
        ),
        st.tuples(st.just("begin fold"), st.none()),
        st.tuples(st.just("clear changes"), st.none()),
        st.tuples(st.just("end fold"), st.booleans()),
        st.tuples(st.just("choose"), st.integers(0, 60)),
        st.tuples(st.just("compact"), st.none()),
    ),
    max_size=30,
)


@given(events)
def test_slots_are_what_a_model_says(history):
    slots, model, next_row = Slots(CAPACITY), {}, 0  # slot: [row, unfolded, folding, changed]
    for event, argument in history:
        if event == "allocate":
            count = min(argument, CAPACITY - len(model))
            rows = int64(range(next_row, next_row + count))
            next_row += count
            end = slots.next_end(count)
            taken = slots.allocate(rows)
            assert slots.end == end <= CAPACITY
            assert sorted(taken.tolist()) == taken.tolist()
            assert not set(taken.tolist()) & set(model)
            model |= {
                slot: [row, False, False, False]
                for slot, row in zip(taken.tolist(), rows.tolist(), strict=True)
            }
        elif event in ("free", "mark_dirty", "mark_changed", "mark_touched"):
            some = [slot for slot in model if argument.random() < 0.4]
            getattr(slots, event)(int64(some))
            for slot in some:
                if event == "free":
                    del model[slot]
                elif event in ("mark_dirty", "mark_changed"):
                    model[slot][1] = True
                    model[slot][3] |= event == "mark_changed"
        elif event == "begin fold":
            slots.begin_fold()
            for entry in model.values():
                if entry[1]:
                    entry[1:3] = entry[3], True
        elif event == "clear changes":
            slots.clear_changes()
            for entry in model.values():
                entry[3] = False
        elif event == "end fold":
            slots.end_fold(folded=argument)
            for entry in model.values():
                entry[1:3] = entry[1] or (entry[2] and not argument), False
        elif event == "compact":
            source, target = slots.compact()
            moved = dict(zip(source.tolist(), target.tolist(), strict=True))
            model = {moved.get(slot, slot): entry for slot, entry in model.items()}
            assert slots.end == len(model)
            assert set(model) == set(range(len(model)))
        else:
            chosen = slots.choose(argument, exclude=DIRTY)
            clean = {
                slot for slot, (_, unfolded, folding, _) in model.items() if not unfolded and not folding
            }
            assert set(chosen.tolist()) <= clean
            assert chosen.size == min(argument, len(clean))
        assert slots.count == len(model)
        assert slots.dirty == sum(unfolded or folding for _, unfolded, folding, _ in model.values())
        changed = [slot for slot, entry in model.items() if entry[3]]
        assert slots.changed == len(changed)
        assert slots.changed_slots().tolist() == sorted(changed)
        for slot, (row, unfolded, folding, _) in model.items():
            assert slots.owner[slot] == row
            assert bool(slots.state[slot] & UNFOLDED) == unfolded
            assert bool(slots.state[slot] & FOLDING) == folding
        assert set(np.flatnonzero(slots.state & USED).tolist()) == set(model)


def test_slots_that_are_freed_are_allocated_again():
    slots = Slots(10)
    slots.allocate(int64(range(10)))
    slots.free(int64([3, 7]))
    assert slots.allocate(int64([90, 91])).tolist() == [3, 7]
    assert slots.end == 10
    slots.free(int64(range(10)))
    assert slots.end == slots.dirty == 0


def test_the_flags_of_records_move_with_them():
    here, there = Slots(10), Slots(10)
    slots = here.allocate(int64(range(6)))
    here.mark_dirty(slots[:4])
    here.mark_changed(slots[2:5])
    here.begin_fold()
    taken = there.allocate(int64(range(6)))
    there.set_flags(taken, here.flags_of(slots))
    assert (there.dirty, there.changed) == (here.dirty, here.changed) == (5, 3)
    for bits in (UNFOLDED, FOLDING, CHANGED):
        assert ((there.state[taken] & bits) == (here.state[slots] & bits)).all()
    here.free(slots)
    assert here.dirty == here.changed == 0


def test_slots_that_were_touched_are_passed_over_once():
    slots = Slots(10)
    slots.allocate(int64(range(10)))
    slots.state[:10] &= ~TOUCHED
    slots.mark_touched(int64([0, 1, 2]))
    assert slots.choose(2, exclude=np.uint8(0)).tolist() == [3, 4]
    assert slots.choose(2, exclude=np.uint8(0)).tolist() == [5, 6]  # the hand continues from there
    assert not (slots.state[[3, 4]] & TOUCHED).any()
    assert slots.choose(10, exclude=np.uint8(0)).tolist() == list(range(10))
    assert slots.choose(0, exclude=np.uint8(0)).size == 0
