"""A predictor of two small matrices, trained on sampled residuals (as Deja Vu's and PowerInfer's own are)."""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

BATCH = 256
LEARNING_RATE = 3e-3
SPREAD = 4.0


def trained(fc1: Tensor, fc2: Tensor, known: tuple[Tensor, Tensor], steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """fc1 (r, H) and fc2 (I, r), trained on from these on inputs (n, H) and activity (n, I).

    Adam on the cross-entropy of every neuron's activity. The scores start with a spread that the loss can tell apart.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs, wanted = known[0].clone(), known[1].float()  # inference tensors cannot be differentiated through
    spread = (torch.relu(inputs @ fc1.T) @ fc2.T).std()
    weights = [fc1.clone().requires_grad_(), (fc2 * (SPREAD / spread)).requires_grad_()]
    optimiser = torch.optim.Adam(weights, lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(inputs), (BATCH,), generator=generator)
        found = torch.relu(inputs[chosen] @ weights[0].T) @ weights[1].T
        loss = binary_cross_entropy_with_logits(found, wanted[chosen])
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
    return weights[0].detach(), weights[1].detach()
