"""The byte-pair tokenizer of a Llama's .gguf file, as a tiktoken.Encoding.

    python -c "import data; print(data.tokenizer('smollm2').encode('two  spaces'))"

A text is cut into pieces by a regular expression, and pairs of bytes are merged inside a piece. The tests
compare the result with Hugging Face's `tokenizers`.
"""

import tiktoken

from support.pretrained.gguf_file import GGUFFile

END = "<|endoftext|>"  # the token before every document
NORMAL = 1  # the type of a token that isn't special

# How a text is cut into pieces; UNSPELLABLE stands for the characters that the vocabulary can't spell.
PATTERNS = {
    # GPT-2's, but each digit is a piece, and so is white space before a digit
    "smollm": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}UNSPELLABLE]+"
              r"|\s+(?=\p{N})|\s+(?!\S)|\s+",
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}UNSPELLABLE]?\p{L}+|\p{N}{1,3}"
                 r"| ?[^\s\p{L}\p{N}UNSPELLABLE]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
NEVER_IN_UTF8 = (0xC0, 0xC1, *range(0xF5, 0x100))


def load_tokenizer(name: str, flag: str) -> tiktoken.Encoding:
    """The tokenizer of a .gguf file, or of smollm2. flag: the setting that named it. Raises BadInput."""
    return build_tokenizer(GGUFFile(name, flag))


def build_tokenizer(file: GGUFFile) -> tiktoken.Encoding:
    """A file's tokenizer. It has a token END: its own, or else the one that begins a text. Raises BadInput.

    A token's number is taken as its rank among the merges, which holds for these two pre-tokenizers.
    """
    pre_tokenizer = file.fields.get("tokenizer.ggml.pre")
    if str(pre_tokenizer) not in PATTERNS:
        raise file.bad(f"its pre-tokenizer is {pre_tokenizer!r}, not one of {', '.join(PATTERNS)}")
    byte_of = byte_of_character()
    special = {}
    ranks = {}
    try:
        tokens = file.fields["tokenizer.ggml.tokens"]
        types = file.fields["tokenizer.ggml.token_type"]
        for number, token in enumerate(tokens):
            if types[number] == NORMAL:
                ranks[bytes(byte_of[character] for character in token)] = number
            else:
                special[token] = number
        if END not in special:
            begin = file.fields["tokenizer.ggml.bos_token_id"]
            special[END] = special.pop(tokens[begin])
        pattern = PATTERNS[pre_tokenizer].replace("UNSPELLABLE", unspellable(ranks))
        return tiktoken.Encoding(file.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special,
                                 explicit_n_vocab=len(tokens))
    except (AssertionError, IndexError, KeyError, TypeError, ValueError):  # a file can hold anything
        raise file.bad("its vocabulary isn't one of byte pairs") from None


def byte_of_character() -> dict[str, int]:
    """The characters that stand for the 256 bytes in GPT-2's vocabularies (OpenAI's bytes_to_unicode).

    A printable character stands for itself, the others are numbered from 256 on: "a" -> 97, "Ġ" -> 32.
    """
    printable = {}
    others = {}
    for byte in range(256):
        if chr(byte).isprintable() and byte != ord(" "):
            printable[chr(byte)] = byte
        else:
            others[chr(256 + len(others))] = byte
    return printable | others


def unspellable(ranks: dict[bytes, int]) -> str:
    """Characters with a byte that the vocabulary lacks, for the [...] of a regular expression.

    These may be control characters, or whole planes of Unicode without assigned characters. A text is
    encoded without them. Raises ValueError if the vocabulary lacks other bytes.
    """
    ranges = []
    for byte in range(256):
        if bytes([byte]) in ranks or byte in NEVER_IN_UTF8:
            continue
        if byte < 0x20 or byte == 0x7F:
            ranges.append(rf"\x{{{byte:x}}}")
        elif 0xF1 <= byte <= 0xF3:  # it begins the UTF-8 of 2^18 characters
            first = (byte - 0xF0) << 18
            last = first + (1 << 18) - 1
            ranges.append(rf"\x{{{first:x}}}-\x{{{last:x}}}")
        else:
            raise ValueError(f"no token for the byte {byte}")
    return "".join(ranges)
