"""What the names of scopes stand for in each kind of network: regular expressions, searched in parameters' names."""

UNET = {
    "cross-attention": r"\.attn2\.",
    "cross-attention-kv": r"\.attn2\.to_[kv]\.",
    "cross-attention+resnets": r"\.attn2\.|\.resnets\.",
    "self-attention": r"\.attn1\.",
    "feed-forward": r"\.ff\.",
    "feed-forward-out": r"\.ff\.net\.2\.weight$",
    "no-cross-attention": r"^(?!.*\.attn2\.)",
    "all": r"",
}

# A transformer that attends to the text: it has no resnets, and its feed-forward layers take their place. Its keys and
# values have biases, which closed forms leave as they are.
CROSS_DIT = UNET | {
    "cross-attention-kv": r"\.attn2\.to_[kv]\.weight$",
    "cross-attention+resnets": r"\.attn2\.|\.ff\.",
    "feed-forward-out": r"\.ff\.(net\.2|conv_point)\.weight$",
}

TEXT_ENCODER = {
    "self-attention": r"\.self_attn\.",
    "feed-forward": r"\.mlp\.",
    "no-token-embedding": r"^(?!.*token_embedding)",
    "all": r"",
}

# Text and picture attend to each other in one attention, each by projections of its own: those of the text are what
# cross-attention is elsewhere. Flux's later blocks join both streams: their projections are the picture's too.
_TEXT, _PICTURE = r"\.add_[qkv]_proj\.|\.to_add_out\.", r"\.attn2?\.to_(q|k|v|out)\b"
JOINT = {
    "cross-attention": _TEXT,
    "cross-attention-kv": r"\.add_[kv]_proj\.",
    "cross-attention+resnets": rf"{_TEXT}|\.ff\.|\.proj_mlp\.",
    "self-attention": _PICTURE,
    "joint-attention": rf"{_TEXT}|{_PICTURE}",
    "feed-forward": r"\.ff(_context)?\.|\.proj_mlp\.",
    "feed-forward-out": r"\.ff(_context)?\.net\.2\.weight$",
    "no-cross-attention": r"^(?!.*(\.add_[qkv]_proj\.|\.to_add_out\.))",
    "all": r"",
}
