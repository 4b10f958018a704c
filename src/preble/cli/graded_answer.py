"""An answer in the demo, and whether it is right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from preble.cli.demo_workload import Task
    from preble.outputs import GenerationOutput


@dataclass(frozen=True)
class GradedAnswer:
    """What came back for a task."""

    task: Task
    output: GenerationOutput
    right: bool | None
    """`None` where the model was not made for these questions."""

    @classmethod
    def of(cls, task: Task, output: GenerationOutput, *, graded: bool) -> GradedAnswer:
        """Grade an output, or leave it."""
        return cls(task, output, task.question.is_answered_by(output.text) if graded else None)

    def as_json(self) -> dict[str, Any]:
        """Plain values; times in seconds."""
        question, output = self.task.question, self.output
        return {
            "handbook": self.task.rank,
            "kind": question.kind,
            "question": question.text,
            "expected": question.answer,
            "text": output.text,
            "right": self.right,
            "replica": output.placement.replica,
            "reason": output.placement.reason,
            "prompt_tokens": output.usage.prompt_tokens,
            "cached_tokens": output.usage.cached_tokens,
            "completion_tokens": output.usage.completion_tokens,
            "ttft": output.timing.ttft,
            "latency": output.timing.total,
        }


def accuracy(right: int, answered: int) -> str:
    """Right answers of those given, as a share that is 100 % only when none is wrong."""
    if not answered:
        return "-"
    percent = 100 * right / answered
    return f"{percent:.0f}%" if right == answered else f"{min(percent, 99.9):.1f}%"
