"""A retrofitted model under tools that others wrote: adapters of peft, the Trainer of transformers."""

import copy

import pytest
import torch
import transformers

from mhc_torch import connection_parameters, retrofit
from tests.mhc_torch.retrofitted import inputs, learned

# The lowest versions have neither.
peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")

# peft, of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
LORA = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


@pytest.mark.parametrize("adapters_first", [True, False])
def test_adapters_of_peft_beside_it(tmp_path, adapters_first):
    plain, x = learned("llama", torch.float64), inputs("llama", torch.float64)
    model = copy.deepcopy(plain)
    if adapters_first:
        model = peft.get_peft_model(model, LORA)
        retrofit(model)
    else:
        model = peft.get_peft_model(retrofit(model), LORA)
    model.eval()
    # Adapters begin at zero, and so does what the maps change.
    torch.testing.assert_close(model(x).logits, plain(x).logits, rtol=0, atol=1e-12)
    # peft freezes all but its own; who wants the maps as well says so.
    for parameter in connection_parameters(model):
        parameter.requires_grad_(True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    before = model(x, labels=x).loss
    for _ in range(5):
        loss = model(x, labels=x).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in trained)
        optimizer.step()
    assert model(x, labels=x).loss < before
    # Adapters alone are saved, and go to another model with the same maps.
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_the_trainer_of_transformers(tmp_path):
    model = retrofit(learned("llama", torch.float32), parameters="new")
    x = inputs("llama", torch.float32)
    rows = [{"input_ids": row, "labels": row} for row in x]
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True,
        report_to=[], save_steps=2, logging_steps=1, dataloader_pin_memory=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, plain[name])}
    assert moved
    assert all(".hyper_connections." in name for name in moved)
    # From the checkpoint in the middle it ends where it ended.
    ended = {name: value.clone() for name, value in model.state_dict().items()}
    again = retrofit(learned("llama", torch.float32), parameters="new")
    second = transformers.Trainer(again, arguments, train_dataset=rows)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, value in again.state_dict().items():
        torch.testing.assert_close(value, ended[name], rtol=0, atol=1e-6)
