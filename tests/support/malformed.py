"""Files that are damaged, hostile or not checkpoints, and what the error message must say of each."""

from __future__ import annotations

import os
import runpy
import zipfile
from dataclasses import dataclass

import torch

from tests.support.malformed_files import (
    OwnClass,
    Writer,
    bare_pickle,
    calls,
    cut,
    edited,
    encoding,
    entries,
    entry,
    fifo,
    header,
    link_to_itself,
    pickled,
    poisoned,
    raw,
    rewritten,
    saved,
    shared_bytes,
    sparse,
    strided,
    taesd,
    with_pickle,
    zipped,
)

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.text_model."


@dataclass(frozen=True)
class Case:
    """`build` writes the file.

    Attributes:
        message: a regular expression.
        name: of the file.
        flags: of the command line.
        as_vae: the file is given as --vae, not as --model.
    """

    build: Writer
    message: str
    name: str = "x.safetensors"
    flags: tuple[str, ...] = ()
    as_vae: bool = False


LONG = "9" * 5000
ONE = '"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
PICKLE = ("--allow-pickle",)

CASES: dict[str, Case] = {
    # Header lengths.
    "empty file": Case(raw(b""), "header is longer than the file"),
    "seven bytes": Case(raw(b"\x02\0\0\0\0\0\0"), "header is longer than the file"),
    "length 0": Case(header(""), "not JSON"),
    "length beyond the file": Case(raw((100).to_bytes(8, "little") + b"{}"), "header is longer than the file"),
    "length 100,000,001": Case(sparse(100_000_001, 100_000_100), "its header has 100000001 bytes"),
    "length 2^63": Case(raw((2**63).to_bytes(8, "little") + b"{}"), "header is longer than the file"),
    "length 2^64 - 1": Case(raw(b"\xff" * 8 + b"{}"), "header is longer than the file"),
    # JSON.
    "not UTF-8": Case(header(b'{"\xff":1}'), "not JSON"),
    "byte order mark": Case(header(b"\xef\xbb\xbf{}"), "not JSON"),
    "a list": Case(header("[]"), "not a JSON object"),
    "null": Case(header("null"), "not a JSON object"),
    "a number": Case(header("17"), "not a JSON object"),
    "truncated": Case(header("{" + ONE, 8), "not JSON"),
    "200,000 lists deep": Case(header('{"a":' + "[" * 200_000 + "]" * 200_000 + "}"), "nested too deeply"),
    "200,000 objects deep": Case(header('{"a":' * 200_000 + "1" + "}" * 200_000), "nested too deeply"),
    "1e999": Case(header('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,1e999]}}', 8), "impossible shape or off"),
    "NaN": Case(header('{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', 8), "not JSON"),
    "a key twice": Case(header("{" + ONE + "," + ONE + "}", 8), "the key 'a' appears twice"),
    "a field twice": Case(header("{" + ONE[:-1] + ',"dtype":"F16"}}', 8), "the key 'dtype' appears twice"),
    "bytes after the JSON": Case(header("{" + ONE + "}x", 8), "not JSON"),
    "half of a surrogate pair": Case(header('{"\\ud800":' + ONE[4:] + "}", 8), "not Unicode"),
    "control character": Case(header('{"a\x01":' + ONE[4:] + "}", 8), "not JSON"),
    "millions of empty lists": Case(header('{"a":[' + "[]," * 3_000_000 + "[]]}"), "more than 300000 items"),
    "a number of 5000 digits": Case(
        header('{"a":{"dtype":"F32","shape":[' + LONG + '],"data_offsets":[0,8]}}'), "impos"
    ),
    # Fields.
    "no dtype": Case(entry(dtype=None), "the key 'the.key' should have exactly"),
    "no shape": Case(entry(shape=None), "the key 'the.key' should have exactly"),
    "no offsets": Case(entry(data_offsets=None), "the key 'the.key' should have exactly"),
    "an extra field": Case(entry(extra=1), "should have exactly"),
    "unknown dtype": Case(entry(dtype="F12"), "'the.key' has the dtype 'F12'; fastsd reads"),
    "dtype is a list": Case(entry(dtype=["F32"]), "has the dtype"),
    "entry is a number": Case(header('{"the.key":3}'), "'the.key' should have exactly"),
    "entry is null": Case(header('{"the.key":null}'), "'the.key' should have exactly"),
    "negative shape": Case(entry(shape=[-1, -2]), "impossible shape"),
    "shape of fractions": Case(entry(shape=[2.0]), "impossible shape"),
    "shape of booleans": Case(entry(shape=[True, 2]), "impossible shape"),
    "shape that overflows": Case(entry(shape=[2**62, 2**62]), "impossible shape"),
    "shape that wraps around": Case(entry(shape=[2**33, 2**33]), "its shape needs"),
    "10,000 dimensions": Case(entry(shape=[1] * 9999 + [2]), "10000 dimensions"),
    "more bytes than shape": Case(entry(shape=[1]), "holds 8 bytes, its shape needs 4"),
    "reversed offsets": Case(entry(data_offsets=[8, 0]), "offsets 8 to 0"),
    "three offsets": Case(entry(data_offsets=[0, 4, 8]), "should have a list for its shape and two data_offsets"),
    "offsets of text": Case(entry(data_offsets=["0", "8"]), "impossible shape or offset"),
    "offsets beyond the file": Case(entry(data_offsets=[0, 800]), "offsets 0 to 800, beyond the file"),
    # Layout.
    "hole": Case(entries((0, 4), (8, 16)), "'key1' leaves a hole"),
    "hole at the start": Case(entries((4, 16)), "'key0' leaves a hole"),
    "overlap": Case(entries((0, 12), (8, 16)), "'key1' overlaps"),
    "alias": Case(entries((0, 16), (0, 16)), "overlaps"),
    "trailing bytes": Case(entries((0, 16), data=17), "header accounts for"),
    "short by one": Case(entries((0, 16), data=15), "beyond the file's 15 bytes"),
    # Metadata.
    "metadata is a list": Case(header('{"__metadata__":[]}'), "metadata is not a table of strings"),
    "metadata is null": Case(header('{"__metadata__":null}'), "metadata is not a table of strings"),
    "metadata of numbers": Case(header('{"__metadata__":{"a":1}}'), "metadata is not a table of strings"),
    "metadata of 90 MB": Case(header('{"__metadata__":{"a":"%s"}}' % ("x" * 90_000_000)), "its header has 900"),
    "nothing but 19 MB of metadata": Case(
        header('{"__metadata__":{"a":"%s"}}' % ("x" * 19_000_000)), "holds no tensors"
    ),
    # Tensors.
    "missing key": Case(
        edited(lambda t: t.pop(f"{UNET}out.2.bias")), "the key model.diffusion_model.out.2.bias is miss"
    ),
    "extra key": Case(edited(lambda t: t.update({f"{UNET}out.2.scale": torch.ones(4)})), "out.2.scale .4. matches no"),
    "wrong shape": Case(edited(lambda t: t.update({f"{UNET}out.2.bias": torch.ones(5)})), "out.2.bias is .5."),
    "transposed": Case(
        edited(lambda t: t.update({f"{UNET}time_embed.0.weight": t[f"{UNET}time_embed.0.weight"].T})),
        "time_embed.0.weight is .32, 128.; the config expects .128, 32.",
    ),
    "NaN among the weights": Case(poisoned(f"{VAE}decoder.conv_out.bias", float("nan")), "conv_out.bias holds NaN"),
    "infinity among the weights": Case(poisoned(f"{TEXT}final_layer_norm.bias", float("inf")), "bias holds infinite"),
    "minus infinity": Case(poisoned(f"{UNET}out.2.weight", -float("inf")), "out.2.weight holds infinite"),
    "beyond fp16": Case(
        poisoned(f"{UNET}out.2.bias", 70000.0), "out.2.bias holds 70000, but float16 ends at", flags=("--dtype", "fp16")
    ),
    "integers": Case(
        edited(lambda t: t.update({f"{UNET}out.2.bias": torch.ones(4, dtype=torch.int64)})), "is torch.int64"
    ),
    "SDXL's UNet with SD 1's text": Case(
        edited(lambda t: t.update({f"{UNET}label_emb.0.0.weight": torch.ones(128, 80)})),
        "those of SD 1, but its UNet has",
    ),
    "a wider text encoder": Case(
        edited(lambda t: t.update({f"{TEXT}embeddings.token_embedding.weight": torch.ones(9, 128)})),
        "give 128 features",
    ),
    "no text encoder": Case(
        edited(lambda t: [t.pop(k) for k in list(t) if k.startswith(TEXT)]), "no text encoder in this file"
    ),
    "no autoencoder": Case(
        edited(lambda t: [t.pop(k) for k in list(t) if k.startswith(VAE)]), "no autoencoder in this file.*--vae"
    ),
    "LoRA": Case(saved(lambda _: {"lora_unet_conv_in.lora_down.weight": torch.ones(4, 4)}), "looks like a LoRA"),
    "an autoencoder as a model": Case(
        saved(lambda t: {k[len(VAE) :]: v for k, v in t.items() if k.startswith(VAE)}),
        "which --vae takes",
    ),
    "a LoRA as an autoencoder": Case(
        saved(lambda _: {"x.lora_down.weight": torch.ones(4, 4)}), "not an autoencoder", as_vae=True
    ),
    "an autoencoder without its decoder": Case(
        saved(lambda t: {k: v for k, v in t.items() if k.startswith(f"{VAE}encoder")}),
        "the key decoder.conv_out.weight is missing",
        as_vae=True,
    ),
    "TAESD as a model": Case(saved(lambda _: taesd()), "it looks like TAESD"),
    "TAESD that ends early": Case(
        saved(lambda _: taesd(without="5.conv.2")),
        r"the key 5\.conv\.2\.weight .* is missing",
        as_vae=True,
    ),
    "TAESD that claims to be wide": Case(
        saved(lambda _: taesd() | {"1.weight": torch.zeros(1024, 4, 3, 3)}),
        r"the key 1\.bias is \[8\]; the config expects \[1024\]",
        as_vae=True,
    ),
    "TAESD's encoder alone": Case(
        saved(lambda _: taesd() | {"0.weight": torch.zeros(8, 3, 3, 3)}),
        "only TAESD's encoder",
        as_vae=True,
    ),
    "no tensors": Case(header("{}"), "it holds no tensors"),
    # Not a model.
    "LFS pointer": Case(
        raw(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4265146304\n"), "Git LFS pointer"
    ),
    "web page": Case(raw(b"<!DOCTYPE html><html><title>404</title></html>"), "a web page"),
    "image": Case(raw(b"\x89PNG\r\n\x1a\n" + bytes(100)), "a PNG image, not weights"),
    "folder": Case(lambda path, _: path.mkdir(), "the folder is empty"),
    "pipe": Case(fifo, "not a regular file"),
    "device": Case(lambda path, _: path.symlink_to("/dev/zero"), "not a regular file"),
    "link to itself": Case(link_to_itself, "too many levels of symbolic links"),
    "link to nothing": Case(lambda path, _: path.symlink_to("nothing"), "no such model"),
    "nothing": Case(lambda path, _: None, "no such model"),
    # Pickles.
    "os.system": Case(calls(os.system, "touch {}"), "it refers to posix.system", "x.ckpt", PICKLE),
    "os.system, its name computed during unpickling": Case(
        calls(os.system, "touch {}", 4), "computed during unpickling", "x.ckpt", PICKLE
    ),
    "eval": Case(calls(eval, "open('{}', 'w')"), "it refers to (__builtin__|builtins).eval", "x.ckpt", PICKLE),
    "runpy": Case(calls(runpy.run_path, "{}"), "it refers to runpy", "x.ckpt", PICKLE),
    "a class of its own": Case(pickled({"state_dict": OwnClass()}), "it refers to .*OwnClass", "x.ckpt", PICKLE),
    "a pickle without a zip": Case(
        bare_pickle(os.system, "touch {}"),
        "not in the form that torch.save has had since PyTorch 1.6",
        "x.ckpt",
        PICKLE,
    ),
    "a pickle called .safetensors": Case(calls(os.system, "touch {}"), "a pickle, which can hold programs"),
    "a bare pickle called .safetensors": Case(
        bare_pickle(os.system, "touch {}"),
        "a pickle, which",
    ),
    "a pickle without --allow-pickle": Case(pickled({"a": torch.ones(2)}), "--allow-pickle", "x.ckpt"),
    "a zip in a zip": Case(
        zipped({"inner/x.ckpt": b"PK\x03\x04" + bytes(100)}), "holds no checkpoint", "x.ckpt", PICKLE
    ),
    "a deflate bomb": Case(
        rewritten(
            lambda m: {k: bytes(2**28) if k.endswith("data/0") else v for k, v in m.items()}, zipfile.ZIP_DEFLATED
        ),
        "is compressed",
        "x.ckpt",
        PICKLE,
    ),
    "a compressed pickle": Case(rewritten(lambda m: m, zipfile.ZIP_DEFLATED), "is compressed", "x.ckpt", PICKLE),
    "a tensor of 10^12 by stride 0": Case(strided((10**12,), (0,)), r"the key 'a' has strides", "x.ckpt", PICKLE),
    "a storage of 10^12": Case(strided((10**12,), (1,), claimed=10**12), "needs 4000000000000 bytes", "x.ckpt", PICKLE),
    "a tensor beyond its storage": Case(strided((4, 5), (5, 1)), "needs 80 bytes|damaged", "x.ckpt", PICKLE),
    "a tensor that starts beyond": Case(strided((4,), (1,), offset=14), "needs 16 bytes|damaged", "x.ckpt", PICKLE),
    "overlapping rows": Case(strided((4, 4), (2, 1)), "has strides", "x.ckpt", PICKLE),
    "a stride over 2^63": Case(strided((2, 2), (2**62, 2**62)), "strides|damaged", "x.ckpt", PICKLE),
    "a memo of 2^32 slots": Case(
        with_pickle(b"\x80\x02}r\xff\xff\xff\xff."), "not a Stable Diffusion", "x.ckpt", PICKLE
    ),
    "a text of 2^62 bytes": Case(
        with_pickle(b"\x80\x04\x8d" + (2**62).to_bytes(8, "little") + b"."), "damaged", "x.ckpt", PICKLE
    ),
    "an empty pickle": Case(with_pickle(b""), "damaged", "x.ckpt", PICKLE),
    "a pickle cut short": Case(with_pickle(b"\x80\x02}q\x00X\x05\x00\x00\x00sta"), "damaged", "x.ckpt", PICKLE),
    "bytes encoded by another codec": Case(
        with_pickle(encoding(b"X\x03\x00\x00\x00hex")), "_codecs.encode for more than bytes", "x.ckpt", PICKLE
    ),
    "bytes encoded again and again": Case(
        with_pickle(b"\x80\x02c_codecs\nencode\nq\x00X\x01\x00\x00\x00aX\x06\x00\x00\x00latin1\x86R0h\x00h\x00\x86R."),
        "_codecs.encode for more than bytes",
        "x.ckpt",
        PICKLE,
    ),
    "a long text encoded often": Case(
        with_pickle(encoding(b"X\x06\x00\x00\x00latin1", text=b"a" * 20_000, times=4)),
        "_codecs.encode for more than bytes",
        "x.ckpt",
        PICKLE,
    ),
    "a callback that holds a call": Case(
        with_pickle(b"\x80\x02cpytorch_lightning.callbacks\nX\ncposix\nsystem\nX\x09\x00\x00\x00touch ran\x85R\x85R."),
        "it refers to posix.system",
        "x.ckpt",
        PICKLE,
    ),
    "a list in a pickle": Case(pickled([torch.ones(2)]), "not a table of tensors", "x.ckpt", PICKLE),
    "two names for one member's bytes": Case(
        shared_bytes, "overlaps|not a complete file|appears twice", "x.ckpt", PICKLE
    ),
    "half a .ckpt": Case(cut(0.5), "not a complete file", "x.ckpt", PICKLE),
    "nearly a .ckpt": Case(cut(0.9999), "not a complete file", "x.ckpt", PICKLE),
    "the first bytes of a .ckpt": Case(cut(0.000003), "not a complete file", "x.ckpt", PICKLE),
    "a document": Case(zipped({"word/document.xml": b"<w/>"}), "holds no checkpoint", "x.ckpt", PICKLE),
}
