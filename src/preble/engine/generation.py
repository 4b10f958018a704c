"""What the engine keeps for one request besides its tokens: sampling state, text, and when to stop."""

from __future__ import annotations

from typing import TYPE_CHECKING

from preble.engine.detokenizer import Detokenizer
from preble.engine.messages import Delta, Submit
from preble.engine.sampler import SamplingState
from preble.engine.stopping import StopMatcher
from preble.outputs import FinishReason, TokenLogprob
from preble.sched.sequence import Sequence

if TYPE_CHECKING:
    from preble.engine.config import ModelConfig
    from preble.engine.token_text import TokenText


class Generation:
    """Turns a request's tokens into text as they come and says when the text ends."""

    __slots__ = ("_detokenizer", "_matcher", "_params", "_stop_tokens", "sampling", "started")

    def __init__(self, request: Submit, tokenizer: TokenText, config: ModelConfig) -> None:
        params = request.sampling
        prompt, delivered = request.token_ids[: request.prompt_length], request.token_ids[request.prompt_length :]
        self.started: float | None = None
        """`time.monotonic()` of the first step that worked on the request."""
        eos = config.eos_token_ids | tokenizer.eos_token_ids
        self.sampling = SamplingState(params, request.seed, prompt, config.vocabulary_size, eos)
        self._params = params
        self._stop_tokens = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            self._stop_tokens |= eos
        self._detokenizer = Detokenizer(tokenizer)
        self._matcher = StopMatcher(params.stop)
        for count, token in enumerate(delivered.tolist(), start=1):
            self.sampling.append(token)
            self._text(token, count)

    def advance(self, sequence: Sequence, token: int, logprob: TokenLogprob | None) -> Delta:
        """Take in the token sampled behind `sequence`, which does not hold it yet."""
        self.sampling.append(token)
        count = sequence.generated + 1
        reason: FinishReason | None = None
        text = ""
        if token in self._stop_tokens and count >= self._params.min_tokens:
            reason = "stop"
        else:
            text = self._text(token, count)
            if self._matcher.stopped:
                reason = "stop"
            elif sequence.length + 1 >= sequence.max_length:
                reason = "length"
        if reason is not None and not self._matcher.stopped:
            text += self._matcher.feed(self._detokenizer.flush()) + self._matcher.flush()
        return self._delta(sequence, (token,), text, logprob, finish_reason=reason)

    def fail(self, sequence: Sequence, error: str) -> Delta:
        """End this request alone with an error."""
        return self._delta(sequence, (), "", None, error=error)

    def _text(self, token: int, count: int) -> str:
        piece = self._detokenizer.append((token,))
        return self._matcher.feed(piece, search=count >= self._params.min_tokens)

    def _delta(
        self,
        sequence: Sequence,
        token_ids: tuple[int, ...],
        text: str,
        logprob: TokenLogprob | None,
        *,
        finish_reason: FinishReason | None = None,
        error: str | None = None,
    ) -> Delta:
        assert self.started is not None
        return Delta(
            request_id=sequence.request_id,
            token_ids=token_ids,
            text=text,
            logprobs=() if logprob is None else (logprob,),
            cached_tokens=min(sequence.cached, sequence.prompt_length),
            started=self.started,
            finish_reason=finish_reason,
            error=error,
        )
