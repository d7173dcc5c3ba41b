"""The whole way in seconds: patch, train, predict, save, load. CI runs it with the newest packages, too."""

import torch
from peft import LoraConfig, get_peft_model
from tiny_lm import make_model

import bayeslora


def _adapted():
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(make_model(64), lora)


def test_train_predict_save_and_load(tmp_path, device):
    model = bayeslora.patch(_adapted().to(device)).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    opt = bayeslora.IVON(trained, lr=0.1, ess=1e3, hess_init=0.1, seed=1)
    tokens = torch.randint(3, 64, (4, 8), generator=torch.Generator().manual_seed(0)).to(device)
    losses = []
    for _ in range(5):
        with opt.sampled_params(train=True):
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    posterior = opt.posterior(model)
    probs = posterior.predict({"input_ids": tokens}, 4)
    assert probs.shape == (4, 8, 64)
    torch.testing.assert_close(probs.sum(-1), torch.ones(4, 8, device=device))
    posterior.save_pretrained(tmp_path)
    loaded = bayeslora.Posterior.from_pretrained(make_model(64).to(device), tmp_path)
    torch.testing.assert_close(loaded.predict({"input_ids": tokens}, 4), probs, rtol=1e-4, atol=1e-6)
