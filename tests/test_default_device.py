"""torch.set_default_device: tensors that the library makes are where they are needed."""

import torch
from peft import LoraConfig, get_peft_model
from tiny_lm import make_model

from bayeslora import IVON, patch


def test_a_default_device_elsewhere_changes_nothing():
    """As ``torch.set_default_device("cuda")`` would with a model on the CPU; meta tensors hold no values."""
    ids = torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(0))
    runs = []
    for device in ("cpu", "meta"):
        torch.manual_seed(0)
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(make_model(40), lora)
        with torch.device(device):
            patch(model)
            opt = IVON.like_adamw([p for p in model.parameters() if p.requires_grad], lr=1e-3, num_data=8)
            for _ in range(2):
                with opt.sampled_params(train=True):
                    model(input_ids=ids, labels=ids).loss.backward()
                opt.step()
                opt.zero_grad()
            opt.load_state_dict(opt.state_dict())
            posterior = opt.posterior(model)
            runs.append([posterior.predict({"input_ids": ids}, 2, batched=b) for b in (False, True)])
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)
