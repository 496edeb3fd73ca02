"""The fixtures' tokenizer: byte-level BPE, digits one by one, special tokens named as MiniMax names them.

One tokenizer serves both models: M3's image and video tokens simply never occur in M2's text.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.training import needles

VOCAB_SIZE = 2048
BOS, EOS, ROLE = "]~!b[", "[e~[", "]~b]"
IMAGE, VIDEO = "]<]image[>[", "]<]video[>["
PAD = "]!p~["
SPECIAL = [PAD, BOS, EOS, ROLE, IMAGE, VIDEO, "]<]start of image[>[", "]<]end of image[>["]
# Ordinary added tokens: kept when special tokens are skipped, so that a tool-call parser sees them.
MARKS = ["<think>", "</think>", "<minimax:tool_call>", "</minimax:tool_call>"]
# A word with at most one leading symbol; one digit; symbols with their line end; line ends; runs of spaces.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

CHAT_TEMPLATE = """\
{%- macro text(content) -%}
{%- if content is string -%}{{ content }}
{%- elif content is not none -%}
{%- for part in content -%}
{%- if part.type == 'image' or part.type == 'image_url' -%}{{ ']<]image[>[' }}
{%- elif part.type == 'video' or part.type == 'video_url' -%}{{ ']<]video[>[' }}
{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{{- ']~!b[' -}}
{%- if messages and messages[0].role == 'system' -%}
{%- set opening = text(messages[0].content) -%}{%- set turns = messages[1:] -%}
{%- else -%}
{%- set opening = 'You are a helpful assistant.' -%}{%- set turns = messages -%}
{%- endif -%}
{{- ']~b]system\\n' + opening -}}
{%- if tools -%}
{{- '\\n\\n# Tools\\nOne JSON schema per line:\\n' -}}
{%- for tool in tools -%}{{- (tool.function if tool.function is defined else tool) | tojson + '\\n' -}}{%- endfor -%}
{{- 'Call a tool like this:\\n<minimax:tool_call>\\n<invoke name="NAME">\\n' -}}
{{- '<parameter name="KEY">VALUE</parameter>\\n</invoke>\\n</minimax:tool_call>' -}}
{%- endif -%}
{{- '[e~[\\n' -}}
{%- for message in turns -%}
{%- if message.role == 'assistant' -%}
{{- ']~b]ai\\n' -}}
{%- if message.reasoning_content -%}{{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' -}}{%- endif -%}
{{- text(message.content) -}}
{%- if message.tool_calls -%}
{{- '\\n<minimax:tool_call>\\n' -}}
{%- for call in message.tool_calls -%}
{%- set call = call.function if call.function is defined else call -%}
{{- '<invoke name="' + call.name + '">\\n' -}}
{%- for key, value in call.arguments.items() -%}
{{- '<parameter name="' + key + '">' + (value if value is string else value | tojson) + '</parameter>\\n' -}}
{%- endfor -%}
{{- '</invoke>\\n' -}}
{%- endfor -%}
{{- '</minimax:tool_call>' -}}
{%- endif -%}
{{- '[e~[\\n' -}}
{%- elif message.role == 'tool' -%}
{{- ']~b]tool\\n<response>' + text(message.content) + '</response>[e~[\\n' -}}
{%- elif message.role in ('user', 'system') -%}
{{- ']~b]' + message.role + '\\n' + text(message.content) + '[e~[\\n' -}}
{%- else -%}
{{- raise_exception('unknown role ' + message.role) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ']~b]ai\\n' -}}{%- endif -%}
"""


def train(texts: list[str], path: Path, sample_bytes: int = 12_000_000) -> None:
    """Trains on about `sample_bytes` of evenly spaced documents plus enough facts to make each key word one token."""
    step = max(1, sum(map(len, texts)) // sample_bytes)
    facts = [needles.fact(a, n, "0 1 2 3 4") for a in needles.ADJECTIVES for n in needles.NOUNS]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL) - len(MARKS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([*texts[::step], *(facts * 100)], trainer)
    bpe.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL])
    bpe.add_tokens([AddedToken(t, normalized=False) for t in MARKS])
    if bpe.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(f"the tokenizer has {bpe.get_vocab_size()} tokens instead of {VOCAB_SIZE}: give it more text")
    bpe.save(str(path))


def load(path: Path) -> Tokenizer:
    return Tokenizer.from_file(str(path))


def write_files(bpe: Tokenizer, folder: Path, max_length: int) -> None:
    """tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json of a model folder."""
    bpe.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "additional_special_tokens": SPECIAL[3:],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    generation = {
        "bos_token_id": bpe.token_to_id(BOS),
        "eos_token_id": bpe.token_to_id(EOS),
        "pad_token_id": bpe.token_to_id(PAD),
        "do_sample": True,
        "temperature": 1.0,
        "top_p": 0.95,
        "top_k": 40,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n")


def split_facts(bpe: Tokenizer) -> dict[str, list[int]]:
    """Token ids of the parts of a fact, such that their concatenation is the encoding of the whole sentence."""
    parts = [needles.LEAD, " is", " ", ".\n", *"0123456789"]
    parts += [" " + w for w in (*needles.ADJECTIVES, *needles.NOUNS)]
    ids = {p: list(bpe.encode(p, add_special_tokens=False).ids) for p in parts}
    for (adjective, noun), code in zip(
        pairwise([*needles.ADJECTIVES, *needles.NOUNS]), range(10_000, 99_999, 777), strict=False
    ):
        whole = bpe.encode(needles.fact(adjective, noun, str(code)), add_special_tokens=False).ids
        glued = [*ids[needles.LEAD], *ids[" " + adjective], *ids[" " + noun], *ids[" is"], *ids[" "]]
        glued += [i for digit in str(code) for i in ids[digit]] + ids[".\n"]
        if whole != glued:
            raise ValueError(f"the tokenizer does not split the fact about the {adjective} {noun} part by part")
    return ids
