"""transformers' own model tests on our classes, a test class per model and shape. Runs inside the package that
`test_transformers_suite.py` makes of transformers' source distribution."""

import copy
import unittest
from unittest import mock

import torch
from transformers.models.auto import modeling_auto

from nanollada.modeling_nanollada import NanoLLaDAConfig, NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM, NanoLLaDAModel

from .skips import OWN_SKIPS
from .test_configuration_common import ConfigTester
from .test_modeling_common import ModelTesterMixin, ids_tensor
from .test_tensor_parallel_mixin import TensorParallelTesterMixin
from .test_training_mixin import TrainingTesterMixin

# The tests look a model's kind up by the name of its class, in the tables of transformers' own models.
modeling_auto.MODEL_MAPPING_NAMES["nanollada"] = "NanoLLaDAModel"
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["nanollada"] = "NanoLLaDAForCausalLM"
modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES["nanollada"] = "NanoLLaDAForMaskedLM"

MASK = 50  # inside the vocabulary that the resizing tests leave, outside of the tokens that the training test repeats
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0}
PLAIN = {}
GROUPED = {"num_key_value_heads": 2, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}
LLAMA_YARN = {"qk_norm": False, "head_dim": 16, "rope_parameters": YARN}


class Bidirectional(NanoLLaDAModel):
    """The backbone as the diffusion model has it."""

    _auto_class = None  # saved without code: this file is none of ours to ship

    def __init__(self, config, is_causal=False):
        super().__init__(config, is_causal)


Bidirectional.__name__ = "NanoLLaDAModel"


class Tester:
    """What the mixins ask of a model's tester."""

    is_training = True
    batch_size, seq_length = 3, 7
    vocab_size, hidden_size, num_hidden_layers, num_attention_heads = 99, 32, 2, 4

    def __init__(self, head, shape):
        self.causal_lm_class, self.shape = head, shape

    def get_config(self):
        names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        size = {name: getattr(self, name) for name in names}
        shape = {**size, "intermediate_size": 36, "max_position_embeddings": 512, **copy.deepcopy(self.shape)}
        return NanoLLaDAConfig(mask_token_id=MASK, **shape)

    def prepare_config_and_inputs_for_common(self):
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Suite(ModelTesterMixin, TensorParallelTesterMixin):
    model_tester = head = None
    test_can_init_all_missing_weights_before_2023 = True  # without it, only files with a copyright year are tested
    shape = PLAIN

    def setUp(self):
        if self._testMethodName in OWN_SKIPS:
            self.skipTest(OWN_SKIPS[self._testMethodName])
        # Its tests write fields of other models (`batch_norm_eps`) into every config; what ours refuses is tested in
        # tests/configuration_nanollada/test_configuration.py.
        patched = mock.patch.object(NanoLLaDAConfig, "_check_names", classmethod(lambda cls, names: None))
        patched.start()
        self.addCleanup(patched.stop)
        self.model_tester = Tester(self.head, self.shape)

    def test_config(self):
        ConfigTester(self, config_class=NanoLLaDAConfig, **self.shape).run_common_tests()


class CausalSuite(Suite, TrainingTesterMixin):
    head = NanoLLaDAForCausalLM
    all_model_classes = (NanoLLaDAModel, NanoLLaDAForCausalLM)


class MaskedSuite(Suite):
    head = NanoLLaDAForMaskedLM
    all_model_classes = (Bidirectional, NanoLLaDAForMaskedLM)


class CausalPlain(CausalSuite, unittest.TestCase):
    pass


class CausalGroupedTiedBiased(CausalSuite, unittest.TestCase):
    shape = GROUPED


class CausalLlamaYarn(CausalSuite, unittest.TestCase):
    shape = LLAMA_YARN


class MaskedPlain(MaskedSuite, unittest.TestCase):
    pass


class MaskedGroupedTiedBiased(MaskedSuite, unittest.TestCase):
    shape = GROUPED


class MaskedLlamaYarn(MaskedSuite, unittest.TestCase):
    shape = LLAMA_YARN


class MaskedBlocks(MaskedSuite, unittest.TestCase):
    shape = {"block_length": 4}


class MaskedLabelShift(MaskedSuite, unittest.TestCase):
    shape = {"label_shift": True}
