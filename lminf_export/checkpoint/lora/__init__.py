"""LoRA adapters of PEFT, merged into a checkpoint tensor by tensor."""
