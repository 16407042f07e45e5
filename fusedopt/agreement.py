"""The optimizer's side of the message by which ranks agree on a step (plan/exchange.py)."""

from __future__ import annotations

from contextlib import suppress

from .plan.checks import served_params
from .plan.exchange import Ranks, Refusal, ranks_of
from .plan.local import join_sums
from .plan.plan import StepInputs
from .scaler.attributes import AmpAttributes


class AgreeingOptimizer(AmpAttributes):
    """Every rank joins each message exactly once, also where its step fails before."""

    def _begin_message(self) -> None:
        ranks = self._ranks()
        if isinstance(ranks, Ranks):
            ranks.joined = False
        self._waiting_ranks()

    def _waiting_ranks(self) -> Ranks | None:
        """The ranks that wait for this step's message; None where nobody asks for an agreement.

        Raises:
            RuntimeError: they cannot share a norm.
        """
        ranks = self._ranks() if self._asks() else None
        if isinstance(ranks, Refusal):
            raise RuntimeError(ranks.why)
        return ranks

    def _asks(self) -> bool:
        """Whether the step computes a norm or decides about a skip."""
        options, amp = self._shared.options, self._shared.amp
        clips_or_skips = options.max_grad_norm is not None or options.skip_nonfinite
        return clips_or_skips or amp.due is not None or "found_inf" in amp.values

    def _join(self, inputs: StepInputs) -> None:
        """Let the step take part in the ranks' message, which the verb ``exchange`` sends."""
        ranks = self._waiting_ranks()
        if ranks is None:
            return
        self._warn_of_scale(ranks)
        inputs.ranks, inputs.measured = ranks, True
        inputs.fingerprint = ranks.fingerprint(self.rule.name, inputs.options, inputs.table)

    def _abort_message(self, inputs: StepInputs | None) -> None:
        """The step has failed: the ranks that still wait for its message have to raise, too."""
        shared = self._shared
        ranks = shared.ranks
        if isinstance(ranks, Refusal):
            self._abort(ranks.ranks)
            return
        if isinstance(ranks, Ranks) and ranks.joined:
            return
        with suppress(AttributeError, KeyError, TypeError):  # of groups that this rank failed for
            # The plan may be of other groups: this step was to build the next one.
            ranks = ranks_of(self.param_groups, shared.options, shared.names)
            if inputs is None or inputs.held is None:
                join_sums(served_params(self.param_groups))
        self._abort(ranks)

    def _abort(self, ranks: Ranks | Refusal | None) -> None:
        if isinstance(ranks, Ranks) and self._asks():
            device = self._flag_device(self._shared.scalars.device)  # of the other ranks' words
            ranks.abort(device, self._shared.options.norm_type)

    def _abort_unbegun(self) -> None:
        """A pre-hook has failed: the ranks whose hooks have not wait for the step's message."""
        with suppress(RuntimeError):  # the hook's own error is being raised
            self._begin_message()
            self._abort_message(None)
