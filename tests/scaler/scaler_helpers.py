"""Iterations of training under a loss scaler: of ours alone, and of ours beside torch's."""

from protocol_helpers import assert_same, give_grads, make_scaler
from torch.nn.utils import clip_grad_norm_


def step_only(scaler, opt, params):
    return scaler.step(opt)


def clip_to(*max_norms):
    """Unscales, clips to one norm after the other, and steps."""

    def call(scaler, opt, params):
        scaler.unscale_(opt)
        for max_norm in max_norms:
            clip_grad_norm_(params, max_norm)
        return scaler.step(opt)

    return call


def iterate(scaler, run, step, bad=None, call=step_only):
    """Gradients, the step, the update; the scale after that."""
    params, opt = run
    give_grads(params, step, scaler.get_scale(), bad)
    call(scaler, opt, params)
    scaler.update()
    return scaler.get_scale()


class BesideTorch:
    """Ours under one scaler, and what it is to train like: torch's under torch's."""

    def __init__(
        self, scaler_name, ours, theirs, our_call=step_only, their_call=step_only, **options
    ):
        self.scaler, self.stock = (make_scaler(n, **options) for n in (scaler_name, "torch"))
        self.ours, self.theirs = ours, theirs
        self.our_call, self.their_call = our_call, their_call

    def iterate(self, step, bad=None):
        scale = iterate(self.scaler, self.ours, step, bad, self.our_call)
        assert scale == iterate(self.stock, self.theirs, step, bad, self.their_call)
        assert self.scaler._get_growth_tracker() == self.stock._get_growth_tracker()
        assert_same(self.ours, self.theirs)
