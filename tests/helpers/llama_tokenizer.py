"""Llama 2's tokenizer, from the pieces of llama2.c's copy."""

from __future__ import annotations

import struct

import tokenizers
from tokenizers import decoders, models, normalizers


def sentencepiece(data: bytes) -> tokenizers.Tokenizer:
    """What transformers makes of a `tokenizer.model`, from llama2.c's copy of its pieces: there is
    no sentencepiece here to read the original."""
    from transformers.convert_slow_tokenizer import generate_merges

    scores, place = {}, 4
    while place < len(data):
        score, length = struct.unpack_from("<fi", data, place)
        piece = data[place + 8 : place + 8 + length].decode()
        piece = piece.strip("\n") if piece in ("\n<s>\n", "\n</s>\n") else piece.replace(" ", "▁")
        scores[piece], place = score, place + 8 + length
    vocab = {piece: number for number, piece in enumerate(scores)}
    bpe = models.BPE(
        vocab, generate_merges(vocab, scores), unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    made = tokenizers.Tokenizer(bpe)
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made
