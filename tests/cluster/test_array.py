"""Job arrays: every task finds its place, and the tasks together do each chunk, whichever of them live."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.cluster.array import SURVEY_SECONDS, ArrayDispatcher, Share, array_share, in_order
from batchinfer.types import Chunk, ExitCode, JobError


def chunks(count: int) -> list[Chunk]:
    return [Chunk(index=i, file=0, start=10 * i, rows=10) for i in range(count)]


def slurm(task: int, count: int, first: int = 0, step: int = 1) -> dict[str, str]:
    given = {"ID": task, "COUNT": count, "MIN": first, "STEP": step}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in given.items()}


def step(rank: int, tasks: int) -> dict[str, str]:
    return {"SLURM_STEP_ID": "0", "SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": str(tasks)}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (slurm(3, 8), Share(3, 8)),
        (slurm(1, 8, first=1), Share(0, 8)),
        (slurm(30, 5, first=10, step=10), Share(2, 5)),
        ({"SLURM_ARRAY_TASK_ID": "4"}, Share(0, 1)),
        (step(1, 3), Share(1, 3)),
        (step(0, 1), None),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "3"}, None),  # the batch script
        (slurm(2, 4) | step(1, 2), Share(5, 8)),
    ],
)
def test_the_place_in_an_array(environment: dict[str, str], expected: Share | None) -> None:
    assert array_share(environment) == expected


def test_numbers_that_make_no_sense_are_shown() -> None:
    with pytest.raises(JobError, match="SLURM_ARRAY_TASK_COUNT=0, SLURM_ARRAY_TASK_ID=1") as caught:
        array_share({"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "0"})
    assert caught.value.exit_code == ExitCode.UNFIT


def test_own_chunks_first_and_the_others_from_their_ends() -> None:
    own, others = in_order(chunks(8), Share(1, 3))
    assert [chunk.index for chunk in own] == [1, 4, 7]
    assert [chunk.index for chunk in others] == [5, 2, 6, 3, 0]


class Task:
    """One task of an array over a common ``output``; holds up to two chunks."""

    def __init__(self, all_chunks: list[Chunk], share: Share, output: list[int]):
        self.output, self.held = output, []
        self.clock = 0.0

        def missing() -> list[Chunk]:
            return [chunk for chunk in all_chunks if chunk.index not in output]

        self.dispatcher = ArrayDispatcher(
            all_chunks, share, lambda chunk: chunk.index in output, missing, (), lambda: self.clock
        )

    def turn(self, finish: bool) -> None:
        self.clock += SURVEY_SECONDS / 3
        self.dispatcher.poll(None)
        if len(self.held) < 2 and (chunk := self.dispatcher.next_chunk(hungry=not self.held)):
            self.held.append(chunk)
        if finish and self.held:
            chunk = self.held.pop(0)
            self.output.append(chunk.index)
            self.dispatcher.done(chunk, None)


@settings(max_examples=150)
@given(tasks=st.integers(1, 5), count=st.integers(0, 15), data=st.data())
def test_every_chunk_is_done_whichever_tasks_live(tasks: int, count: int, data: st.DataObject) -> None:
    output: list[int] = []
    array = [Task(chunks(count), Share(task, tasks), output) for task in range(tasks)]
    numbers = st.integers(0, tasks - 1)
    for number, finish in data.draw(st.lists(st.tuples(numbers, st.booleans()), max_size=60)):
        array[number].turn(finish)
    alive = data.draw(st.sets(numbers, min_size=1))
    for _ in range(3 * count + 5):
        for number in alive:
            array[number].turn(finish=True)
    assert set(output) == set(range(count))
    assert all(array[number].dispatcher.finished for number in alive)


def test_tasks_of_equal_speed_do_nothing_twice() -> None:
    output: list[int] = []
    array = [Task(chunks(24), Share(task, 4), output) for task in range(4)]
    while not all(task.dispatcher.finished for task in array):
        for task in array:
            task.turn(finish=True)
    assert sorted(output) == list(range(24))


def test_what_is_in_hand_is_not_taken_again() -> None:
    dispatcher = ArrayDispatcher(chunks(3), Share(0, 1), lambda chunk: False, lambda: chunks(3), held=[0, 2])
    assert dispatcher.next_chunk(hungry=False).index == 1
    assert dispatcher.next_chunk(hungry=False) is None
    for index in range(3):
        assert not dispatcher.finished
        dispatcher.done(chunks(3)[index], None)
    assert dispatcher.finished


def test_a_task_ends_when_the_others_have_done_what_it_still_computes() -> None:
    output: list[int] = []
    task = Task(chunks(2), Share(0, 2), output)
    task.turn(finish=False)
    assert task.held
    output += [0, 1]
    for _ in range(4):
        task.turn(finish=False)
    assert task.dispatcher.finished
