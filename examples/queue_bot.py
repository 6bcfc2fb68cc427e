"""A chat bot's worker: users post prompts, one pipeline takes them in turn, each user has one image in work.

    python examples/queue_bot.py "a handwritten three" "a handwritten four"

Where a chat library calls `Bot.ask` with a user's name and text, a newer request of the same user ends the older one.
"""

from __future__ import annotations

import asyncio
import sys

import fastsd


class Bot:
    def __init__(self, pipe: fastsd.Pipeline):
        self.pipe = pipe
        self.tasks: dict[str, asyncio.Task[fastsd.Result]] = {}

    async def ask(self, user: str, prompt: str) -> fastsd.Result | None:
        """The images for a prompt, or None: the user asked for something else meanwhile."""
        if user in self.tasks:
            self.tasks[user].cancel()
        task = self.tasks[user] = asyncio.create_task(self.pipe.generate(prompt, num_inference_steps=10))
        await asyncio.wait({task})
        return None if task.cancelled() else task.result()


async def main(prompts: list[str]) -> None:
    bot = Bot(fastsd.Pipeline.from_pretrained("digits"))
    answers = await asyncio.gather(*(bot.ask(f"user{i}", prompt) for i, prompt in enumerate(prompts)))
    for i, answer in enumerate(answers):
        if answer is not None:
            answer.images[0].save(f"answer{i}.png")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
