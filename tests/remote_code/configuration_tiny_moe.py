"""Configuration of the small model."""

from transformers import PretrainedConfig


class TinyMoeConfig(PretrainedConfig):
    model_type = "tiny_moe"

    def __init__(
        self,
        style="pairs",
        vocab_size=96,
        hidden_size=32,
        moe_intermediate_size=24,
        num_hidden_layers=2,
        num_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        pretraining_tp=1,
        **kwargs,
    ):
        self.style = style
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.moe_intermediate_size = moe_intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.n_shared_experts = n_shared_experts
        self.pretraining_tp = pretraining_tp
        super().__init__(**kwargs)
