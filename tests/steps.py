"""One step of a recipe on this process's part of a batch."""

import copy

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def step_on_part(model, *arguments):
    """What the model returns of these arguments, without the loss; the loss; and the gradients.

    Batch normalization keeps its statistics, which those of a part of the batch would not be. The
    gradients are averaged over the processes. The model itself stays as it is.
    """
    model = copy.deepcopy(model)
    norms = (x for x in model.modules() if isinstance(x, nn.modules.batchnorm._BatchNorm))
    nn.ModuleList(norms).eval()
    ddp = DistributedDataParallel(model)  # it averages the gradients as long as it lives
    returned = ddp(*arguments)
    loss, *others = returned if isinstance(returned, tuple) else (returned,)
    loss.backward()
    gradients = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    return others, loss.detach(), gradients, model
