"""Dtypes by torch's names without the prefix, as the format writes them: their size, and their safetensors names."""

from __future__ import annotations

from gpumove.errors import ConfigError

# torch's dtype names (without prefix) -> safetensors' names. Others are stored as U8; the part keeps the real name.
SAFETENSORS_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8",
    "bool": "BOOL", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "complex64": "C64",
}  # fmt: skip

# torch's dtypes by the bytes of one element (sub-byte ones are stored in whole bytes, as torch does).
_SIZES = {
    1: "bool uint8 int8 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu float4_e2m1fn_x2 "
    "bits8 bits1x8 bits2x4 bits4x2 qint8 quint8 quint2x4 quint4x2 "
    "int1 int2 int3 int4 int5 int6 int7 uint1 uint2 uint3 uint4 uint5 uint6 uint7",
    2: "float16 bfloat16 int16 uint16 bits16",
    4: "float32 int32 uint32 complex32 qint32",
    8: "float64 int64 uint64 complex64",
    16: "complex128",
}
_ITEM_BYTES = {name: size for size, names in _SIZES.items() for name in names.split()}


def item_bytes(dtype: str) -> int:
    """Bytes of one element.

    Raises:
        ConfigError: a dtype that this version does not know.
    """
    if dtype not in _ITEM_BYTES:
        raise ConfigError(
            f"the checkpoint holds tensors of dtype {dtype!r}, which this gpumove does not know: upgrade gpumove",
            code="config.unknown_dtype",
        )
    return _ITEM_BYTES[dtype]
