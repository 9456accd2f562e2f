"""Text encoders that are language models: the word within its chat template, by ComfyUI's own tokenizers and cuts."""

import importlib

import pytest
import torch

from tests.support.comfy_models import TINY, make_model

pytestmark = pytest.mark.host

# Tokenizer and encoder of each family, in comfy.text_encoders; how many layers' states the encoder stacks
ENCODERS = {
    "flux2": ("flux", "KleinTokenizer", "Flux2TEModel", 3),
    "longcat-image": ("longcat_image", "LongCatImageTokenizer", "LongCatImageTEModel", 0),
    "ovis-image": ("ovis", "OvisTokenizer", "OvisTEModel", 0),
    "hunyuan-image": ("hunyuan_image", "HunyuanImageTokenizer", "HunyuanImageTEModel", 0),
    "qwen-image": ("qwen_image", "QwenImageTokenizer", "QwenImageTEModel", 0),
    "mage-flow": ("mage_flow", "MageFlowTokenizer", "MageFlowTEModel", 0),
    "krea2": ("krea2", "Krea2Tokenizer", "Krea2TEModel", 12),
    "z-image": ("z_image", "ZImageTokenizer", "ZImageTEModel", 0),
}
TEXT = "a red starfish on the beach"
WORD = (6, 14)


class Clip:
    """ComfyUI's tokenizer and encoder of a family, but for the language model: states are random, one for each token.

    What the encoder cuts off is found out by giving it the tokens' places in the place of states.
    """

    def __init__(self, family, width):
        module, tokenizer, encoder, self.layers = ENCODERS[family]
        module = importlib.import_module(f"comfy.text_encoders.{module}")
        self.tokenizer = getattr(module, tokenizer)()
        kind = getattr(module, encoder)
        self.encoder = kind.__new__(kind)
        torch.nn.Module.__init__(self.encoder)
        self.encoder.byt5_small, self.width = None, width

    def tokenize(self, text):
        return self.tokenizer.tokenize_with_weights(text)

    def kept(self, tokens):
        """Places, in the row, of the tokens that are left."""
        from comfy import sd1_clip

        (row,) = next(iter(tokens.values()))
        places = torch.arange(len(row)).float()[None, :, None].expand(1, -1, 4)
        if self.layers:
            places = places[:, None].expand(-1, self.layers, -1, -1)
        own, pair = sd1_clip.SD1ClipModel.encode_token_weights, "Ovis" in type(self.encoder).__name__
        given = (places, None) if pair else (places, None, {"attention_mask": torch.ones(1, len(row))})
        sd1_clip.SD1ClipModel.encode_token_weights = lambda *_: given
        try:
            return [int(place) for place in self.encoder.encode_token_weights(tokens)[0][0, :, 0]]
        finally:
            sd1_clip.SD1ClipModel.encode_token_weights = own

    def encode_from_tokens_scheduled(self, tokens):
        (row,) = next(iter(tokens.values()))
        ids = [row[place][0] for place in self.kept(tokens)]
        states = [torch.randn(self.width, generator=torch.Generator().manual_seed(token)) for token in ids]
        return [[torch.stack(states)[None], {"pooled_output": None}]]


@pytest.fixture(params=ENCODERS)
def family(request):
    return request.param


@pytest.fixture
def clip(comfy, family):
    return Clip(family, TINY[family].width)


@pytest.fixture
def host(pack):
    return lambda name: importlib.import_module(f"{pack.__name__}.nodes.host.{name}")


def test_the_word_stands_where_its_tokens_are(host, clip):
    """In the row, and in what the encoder leaves of it."""
    tokens = clip.tokenize(TEXT)
    (row,) = next(iter(tokens.values()))
    kept = clip.kept(tokens)
    chat = host("words").chat_of(clip, TEXT)
    inner = next(value for value in vars(clip.tokenizer).values() if hasattr(value, "inv_vocab")).tokenizer
    for each, places in ((chat, range(len(row))), (chat.placed(len(kept)), kept)):
        first, last = each.subject(TEXT, WORD)
        assert inner.decode([row[places[i]][0] for i in range(first, last)]).strip() == "starfish"
        own = [token for token, *_ in each.own]
        assert inner.decode([row[places[i]][0] for i in own]).strip() == TEXT
    assert len(kept) <= len(row) and len(chat.own) < len(row)


def test_a_text_that_was_not_encoded_is_refused(host, clip):
    chat = host("words").chat_of(clip, "a " * 400)
    with pytest.raises(ValueError, match="Connect the very text that the prompt was encoded from"):
        chat.placed(20)


def test_words_of_sd3_are_not_told(host, comfy):
    """Its stream has 77 tokens of CLIP before T5's, so that words by T5's places would be wrong ones."""
    from types import SimpleNamespace

    from comfy.text_encoders.sd3_clip import SD3Tokenizer

    tokenizer = SD3Tokenizer()
    clip = SimpleNamespace(tokenizer=tokenizer, tokenize=tokenizer.tokenize_with_weights)
    with pytest.raises(ValueError, match=r"words cannot be told in it\. Leave clip empty"):
        host("risk").named_words(torch.zeros(77 + 77), clip, TEXT)


def test_a_concept_is_made_and_shown(node_classes, apply, run, clip, family):
    """Calibrate, Apply, Risk Probe and Risk Map, with the family's own tokens."""
    case, model = TINY[family], make_model(family)
    latent = {"samples": torch.zeros_like(case.latent(batch=2))}
    unsafe = "a red [starfish] on the beach\na [starfish] in blue water\none big [starfish] here"
    safe = "a red house on the beach\na bird in blue water\none big tree here"
    node = node_classes["SafeRoPE_CalibrateConcept"]
    settings = {"rank": 5, "cut": 0.0, "turned": "qk", "quantile": 0.5}
    with torch.inference_mode():
        concepts, report, *_ = node.execute(model, clip, "Fish", unsafe, safe, latent, **settings).result
    assert concepts[0].geometry.family == family and family in report
    positive = clip.encode_from_tokens_scheduled(clip.tokenize(TEXT))
    positive = [[positive[0][0], {"pooled_output": torch.zeros(1, 16)}]]
    protected, recorder = node_classes["SafeRoPE_Apply"].execute(model, concepts, 1.0).result
    samples, plain = (run(each, positive, noise=case.latent()) for each in (protected, model))
    assert not torch.equal(samples, plain)
    mapped = node_classes["SafeRoPE_RiskMap"].execute(recorder, {"samples": samples}, clip, TEXT).result
    assert "Fish: risk" in mapped[1] and any(word in mapped[1] for word in TEXT.split())
