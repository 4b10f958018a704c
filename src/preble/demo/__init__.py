"""The built-in model and what it can do: answer questions about handbooks exactly, so that every answer is graded."""

from preble.demo.checkpoint import CHECKPOINT
from preble.demo.handbook import Fact, Handbook, Question

__all__ = ["CHECKPOINT", "Fact", "Handbook", "Question"]
