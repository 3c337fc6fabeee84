from __future__ import annotations

import asyncio

import pytest

from rewards.memory import MemoryBudget, OverBudget, Shortage, is_out_of_memory


def test_bytes_return_at_the_end_of_a_share_whatever_ends_it() -> None:
    budget = MemoryBudget(10, patience=0.0)

    async def work() -> None:
        async with budget.share() as take:
            await take(4)
            await take(6)
            assert budget.held == 10
            raise KeyError

    with pytest.raises(KeyError):
        asyncio.run(work())
    assert budget.held == 0


def test_a_share_above_the_whole_is_refused_and_one_above_the_rest_waits_in_vain() -> None:
    budget = MemoryBudget(10, patience=0.0)

    async def work() -> None:
        async with budget.share() as first, budget.share() as second:
            await first(7)
            await second(3)
            with pytest.raises(Shortage, match="MB of memory are in use"):
                await second(1)
            with pytest.raises(OverBudget, match="MB of memory, expected at most"):
                await second(8)
            assert budget.held == 10

    asyncio.run(work())
    assert budget.held == 0


def test_a_share_waits_until_bytes_are_free() -> None:
    budget, order = MemoryBudget(10, patience=60.0), list[str]()

    async def hold(name: str, size: int) -> None:
        async with budget.share() as take:
            await take(size)
            order.append(name)
            await asyncio.sleep(0)

    async def work() -> None:
        async with budget.share() as take:
            await take(8)
            waiting = [asyncio.create_task(hold("large", 9)), asyncio.create_task(hold("small", 2))]
            while not order:
                await asyncio.sleep(0)
        await asyncio.gather(*waiting)

    asyncio.run(work())
    assert order == ["small", "large"]


def test_a_shortage_is_recognised_behind_other_errors() -> None:
    outer = ValueError("the reward failed")
    outer.__cause__ = MemoryError()
    assert is_out_of_memory(outer)
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"))
    assert not is_out_of_memory(ValueError("not enough memory"))
    assert not is_out_of_memory(RuntimeError("another"))
