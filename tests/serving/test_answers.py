"""An answer is made once, outlives a broken connection for a while, and can be withdrawn."""

from __future__ import annotations

import asyncio
import math

import pytest

from serving.answers import Answers, ReusedIdError, WithdrawnError


def test_an_answer_is_made_once_and_forgotten_last():
    async def run() -> None:
        answers, made = Answers(max_bytes=25, linger_s=10), []

        async def make() -> bytes:
            made.append(1)
            await asyncio.sleep(0)
            return b"x" * 10

        both = await asyncio.gather(*(answers.once("a", b"1", make) for _ in range(2)))
        assert (both, len(made)) == ([b"x" * 10] * 2, 1)
        with pytest.raises(ReusedIdError, match="id 'a' was another request's"):
            await answers.once("a", b"2", make)
        for key in ("b", "c"):
            await answers.once(key, b"1", make)
        assert (await answers.once("c", b"1", make), len(made)) == (b"x" * 10, 3)
        await answers.once("a", b"1", make)
        assert len(made) == 4, "the oldest made room for the newest"

    asyncio.run(run())


def test_a_failure_is_not_kept():
    async def run() -> None:
        answers, turns = Answers(max_bytes=100, linger_s=10), iter([ValueError("no"), None])

        async def make() -> bytes:
            error = next(turns)
            if error:
                raise error
            return b"yes"

        with pytest.raises(ValueError, match="no"):
            await answers.once("a", b"1", make)
        await asyncio.sleep(0)
        assert await answers.once("a", b"1", make) == b"yes"

    asyncio.run(run())


def test_an_asker_may_come_back_for_a_while_and_nobody_waits_for_ever():
    async def run() -> None:
        answers, ended = Answers(max_bytes=100, linger_s=0.2), []

        async def make() -> bytes:
            try:
                await asyncio.sleep(0.3)
            except asyncio.CancelledError:
                ended.append(1)
                raise
            return b"yes"

        first = asyncio.ensure_future(answers.once("a", b"1", make))
        await asyncio.sleep(0.05)
        first.cancel()
        await asyncio.sleep(0.05)
        assert await answers.once("a", b"1", make) == b"yes"
        gone = asyncio.ensure_future(answers.once("b", b"1", make))
        await asyncio.sleep(0.01)
        gone.cancel()
        await asyncio.sleep(0.28)
        assert ended == [1]
        kept = asyncio.ensure_future(answers.once("c", b"1", make))
        await asyncio.sleep(0.01)
        answers.withdraw("c")
        answers.withdraw("never asked")
        with pytest.raises(WithdrawnError, match="id 'c' was withdrawn"):
            await kept
        assert ended == [1, 1]

    asyncio.run(run())


def test_without_an_end_to_its_waiting_an_answer_is_made_for_nobody():
    async def run() -> None:
        answers, made = Answers(max_bytes=100, linger_s=math.inf), []

        async def make() -> bytes:
            await asyncio.sleep(0.02)
            made.append(1)
            return b"yes"

        gone = asyncio.ensure_future(answers.once("a", b"1", make))
        await asyncio.sleep(0.01)
        gone.cancel()
        await asyncio.sleep(0.1)
        assert made == [1]
        assert (await answers.once("a", b"1", make), made) == (b"yes", [1])

    asyncio.run(run())
