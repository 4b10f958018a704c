"""Examples for the help of each command."""

from __future__ import annotations

EXAMPLES = {
    "": (
        "preble demo",
        'preble generate --model path/to/model "Once upon a time"',
        "preble plan --trace prompts.jsonl --cost mistral-7b-a6000 --slo ttft=2.0,tpot=0.1",
    ),
    "demo": ("preble demo", "preble demo --policy sglang --replicas 3 --requests 96 --json demo.json"),
    "generate": (
        'preble generate --model path/to/model "Once upon a time" --max-tokens 64',
        "preble generate --model demo --temperature 0.8 --seed 7 < prompt.txt",
    ),
    "chat": (
        "preble chat --model path/to/model",
        'preble chat --model path/to/model --system "Answer in one sentence." --temperature 0.7',
    ),
    "sim": (
        "preble sim --workload tool-use --policy e2,round-robin --replicas 4 --cost mistral-7b-a6000",
        "preble sim --trace prompts.jsonl --rate-scale 2 --fail 1@30+10 --html sim.html",
    ),
    "study": ("preble study prompts.jsonl", "preble study trace.jsonl --format mooncake --html study.html"),
    "plan": (
        "preble plan --trace prompts.jsonl --cost mistral-7b-a6000 --slo ttft=2.0,tpot=0.1",
        "preble plan --workload chat --rate 40 --policy pmc --attain 0.95",
    ),
    "bench": ("preble bench engine --quick", "preble bench sim --grid quick"),
    "bench engine": ("preble bench engine --quick", "preble bench engine --json engine.json"),
    "bench sched": ("preble bench sched --quick", "preble bench sched --json sched.json"),
    "bench gpu": ("preble bench gpu --out gpu-results", "preble bench gpu --out gpu-results --dry-run"),
    "bench fidelity": ("preble bench fidelity --requests 600 --load 0.7 --json fidelity.json",),
    "bench sim": (
        "preble bench sim --grid quick",
        "preble bench sim --traces prompts.jsonl --replicas 2,4 --policies e2,pmc --out tournament",
    ),
    "bench workers": ("preble bench workers --rounds 7 --json workers.json",),
}
"""Command, without `preble` -> what one may type."""
