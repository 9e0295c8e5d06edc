"""The values that programs send and read: name of the type, and the value in Python."""

import datetime
import decimal
import uuid

VALUES = {
    "bool": True,
    "int2": -32768,
    "int4": 2**31 - 1,
    "int8": -(2**63),
    "float4": 1.5,
    "float8": 1e-300,
    "numeric": decimal.Decimal("12345678901234567890.123456789"),
    "text": 'it\'s a "quote"\nanother line, ünïcödé ✓',
    "varchar": "",
    "bytea": bytes(range(256)),
    "date": datetime.date(2024, 2, 29),
    "timestamptz": datetime.datetime(2024, 2, 29, 12, 0, 0, 123456, datetime.UTC),
    "interval": datetime.timedelta(days=3, seconds=5, microseconds=7),
    "uuid": uuid.UUID("5ca1ab1e-0000-4000-8000-00000000c0de"),
    "int4[]": [1, 2, 3],
    "text[]": ["a", None, ""],
    "int8 ": None,
}
JSON = '{"a": [1, null, "ü"]}'
