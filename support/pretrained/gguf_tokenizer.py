"""The byte-pair tokenizer of a Llama's .gguf file, as a tiktoken.Encoding.

    python -c "import data; print(data.tokenizer('smollm2').encode('two  spaces'))"

A regular expression cuts a text into pieces, and pairs of bytes are merged inside each piece. The
tests compare the tokens with those of Hugging Face's `tokenizers`.
"""

import tiktoken

from support.pretrained.gguf_file import GGUFFile

END = "<|endoftext|>"  # the token before every document
NORMAL = 1  # the type of a token that isn't special

# SmolLM2 has no tokens for these control characters and unassigned planes. They are dropped.
LEFT_OUT = r"\x{4}\x{6}\x{13}\x{14}\x{16}\x{1d}\x{40000}-\x{bffff}"
PATTERNS = {  # regular expressions for the pieces of a text
    # GPT-2's, but each digit is a piece, and so is white space before a digit
    "smollm": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}" + LEFT_OUT + "]+"
    r"|\s+(?=\p{N})|\s+(?!\S)|\s+",
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def load_tokenizer(name: str, flag: str) -> tiktoken.Encoding:
    """The tokenizer of a .gguf file, or of smollm2. Raises BadInput.

    flag: the setting that named it
    """
    return build_tokenizer(GGUFFile(name, flag))


def build_tokenizer(file: GGUFFile) -> tiktoken.Encoding:
    """A file's tokenizer. If it has no token END, the token that begins a text becomes END.

    A token's number is used as its rank among the merges. This is right for SmolLM2 and Llama 3.
    Raises BadInput.
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
        return tiktoken.Encoding(
            file.name,
            pat_str=PATTERNS[pre_tokenizer],
            mergeable_ranks=ranks,
            special_tokens=special,
            explicit_n_vocab=len(tokens),
        )
    except (AssertionError, LookupError, TypeError, ValueError):  # a file can hold anything
        raise file.bad("its vocabulary isn't one of byte pairs") from None


def byte_of_character() -> dict[str, int]:
    """The characters that stand for the 256 bytes in GPT-2's vocabulary (its `bytes_to_unicode`).

    A printable character stands for itself; others are numbered from 256 on: "a" -> 97, "Ġ" -> 32.
    """
    printable = {}
    others = {}
    for byte in range(256):
        if chr(byte).isprintable() and byte != ord(" "):
            printable[chr(byte)] = byte
        else:
            others[chr(256 + len(others))] = byte
    return printable | others
