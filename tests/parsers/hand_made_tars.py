"""Tars with headers and contents that no writer at hand makes, written byte by byte: ``TARS``."""

import gzip
import io
import struct
import zipfile

from tests.parsers.tar_comparison import SAME

END = bytes(1024)


def header(name=b"", size: int | bytes = 0, kind=b"0", link=b"", magic=b"ustar\x0000", prefix=b"", **fields):
    """A header. ``fields``: mode, owner, group, time, major, minor and ``sum``, a function of the block.

    A size, owner or time is a number, or the bytes of its field.
    """
    numbers = {"mode": 0o644, "owner": 0, "group": 0, "size": size, "time": 1_700_000_000, "major": 0, "minor": 0}
    numbers |= {key: value for key, value in fields.items() if key != "sum"}
    widths = {"mode": 8, "owner": 8, "group": 8, "size": 12, "time": 12, "major": 8, "minor": 8}
    cells = {key: _number(value, widths[key]) for key, value in numbers.items()}
    first = name.ljust(100, b"\0") + b"".join(cells[key] for key in ("mode", "owner", "group", "size", "time"))
    last = (
        kind + link.ljust(100, b"\0") + magic + bytes(64) + cells["major"] + cells["minor"] + prefix.ljust(155, b"\0")
    )
    block = (first + b" " * 8 + last).ljust(512, b"\0")
    return block[:148] + fields.get("sum", _usual_sum)(block) + block[156:]


def member(name, data=b"x", kind=b"0", **fields):
    """A header with its data, padded."""
    return header(name, fields.pop("size", len(data)), kind, **fields) + padded(data)


def padded(data):
    return data + bytes(-len(data) % 512)


def pax(kind=b"x", **records):
    """A pax header with these records; ``_`` in a key is a dot."""
    return member(b"pax", b"".join(record(key.replace("_", "."), value) for key, value in records.items()), kind)


def record(key, value):
    text = b" %s=%s\n" % (key.encode(), value)
    length = len(text) + 1
    while len(b"%d" % length) + len(text) != length:
        length += 1
    return b"%d" % length + text


def gnu(kind, data):
    """A long name (L) or link (K) of GNU tar."""
    return member(b"././@LongLink", data, kind, magic=b"ustar  \0")


def base_256(number, width=12):
    return b"\x80" + number.to_bytes(width - 1, "big")


def _number(value, width):
    if isinstance(value, bytes):
        return value.ljust(width, b"\0")
    return b"%0*o\0" % (width - 1, value)


def _usual_sum(block):
    return b"%06o\0 " % sum(block)


def _signed_sum(block):
    return b"%06o\0 " % sum(struct.unpack("512b", block))


def pair(key=b"a", **fields):
    return member(key + b".jpg", b"of jpg", **fields) + member(key + b".txt", b"of txt", **fields)


def names(*listed):
    """A tar of members with these names; the data are the numbers of the members."""
    return b"".join(member(name, b"%d" % number) for number, name in enumerate(listed))


def _zip():
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("a.jpg", b"x")
    return out.getvalue()


OTHER = pair(b"z")
"""A sample after the member in question, which a reader that stops early would lose."""

TARS = {
    # -- numbers -------------------------------------------------------------------------------------------------------
    "size_in_base_256": (pair(size=base_256(6)) + OTHER + END, SAME),
    "size_in_negative_base_256": (
        member(b"a.jpg", b"", size=b"\xff" * 11 + b"\0") + OTHER + END,
        "a member of .* bytes",
    ),
    "size_of_12_digits": (pair(size=b"000000000006") + OTHER + END, SAME),
    "size_with_spaces_before": (pair(size=b"          6\0") + OTHER + END, SAME),
    "size_with_a_space_after": (pair(size=b"6 ") + OTHER + END, SAME),
    "size_that_is_empty": (member(b"a.jpg", b"", size=b"") + OTHER + END, SAME),
    "size_with_a_sign": (pair(size=b"+6") + OTHER + END, "a size that is not a number"),
    "size_with_an_underscore": (pair(size=b"0_6") + OTHER + END, "a size that is not a number"),
    "size_in_decimal_digits": (pair(size=b"00000000008\0") + OTHER + END, "a size that is not a number"),
    "size_with_bytes_after_its_end": (pair(size=b"6\0 9") + OTHER + END, "a size that is not a number"),
    "size_beyond_the_limit": (header(b"a.jpg", base_256(1 << 40)) + END, "a member of 1,099,511,627,776 bytes"),
    "mode_that_is_empty": (pair(mode=b"") + OTHER + END, SAME),
    "time_before_1970": (pair(time=b"\xff" * 12) + OTHER + END, SAME),
    "owner_in_base_256": (pair(owner=base_256(1 << 40, 8)) + OTHER + END, SAME),
    "owner_with_7_spaces": (pair(owner=b"      0\0") + OTHER + END, SAME),
    "device_numbers_that_are_empty": (pair(major=b"", minor=b"") + OTHER + END, SAME),
    # -- checksums, magics, types --------------------------------------------------------------------------------------
    "checksum_with_spaces_before": (pair(sum=lambda b: b"%6o\0 " % sum(b)) + OTHER + END, SAME),
    "checksum_of_7_digits": (pair(sum=lambda b: b"%07o\0" % sum(b)) + OTHER + END, SAME),
    "checksum_of_8_digits": (pair(sum=lambda b: b"%08o" % sum(b)) + OTHER + END, SAME),
    "checksum_of_signed_bytes": (pair("é".encode(), sum=_signed_sum) + OTHER + END, "not a tar header"),
    "checksum_that_is_empty": (pair(sum=lambda b: b" " * 8) + OTHER + END, "not a tar header"),
    "magic_of_gnu": (pair(magic=b"ustar  \0") + OTHER + END, SAME),
    "magic_of_gnu_with_a_prefix": (pair(magic=b"ustar  \0", prefix=b"d") + OTHER + END, "incremental"),
    "magic_of_star": (pair(magic=b"tar\0\0\0\0\0") + OTHER + END, SAME),
    "magic_that_is_empty": (pair(magic=bytes(8)) + OTHER + END, SAME),
    "magic_without_a_version": (pair(magic=b"ustar\0\0\0") + OTHER + END, SAME),
    "type_of_old_tar": (pair(kind=b"\0") + OTHER + END, SAME),
    "type_contiguous": (pair(kind=b"7") + OTHER + END, SAME),
    "types_mixed": (member(b"a.jpg", kind=b"7") + member(b"a.txt", kind=b"\0") + OTHER + END, SAME),
    "type_unknown": (member(b"a.jpg", kind=b"Z") + OTHER + END, "type b'Z'"),
    "type_of_solaris_attributes": (member(b"a", kind=b"A") + OTHER + END, "type b'A'"),
    "type_of_solaris_pax": (member(b"a", record("path", b"b.jpg"), kind=b"X") + pair() + END, "type b'X'"),
    "type_of_a_volume": (member(b"label", b"", kind=b"V") + OTHER + END, "type b'V'"),
    "type_continued": (member(b"a.jpg", kind=b"M") + OTHER + END, "type b'M'"),
    "type_dump_folder": (member(b"d", kind=b"D") + OTHER + END, "type b'D'"),
    "type_old_long_name": (member(b"a", kind=b"N") + OTHER + END, "type b'N'"),
    "folder_of_old_tar": (member(b"d.jpg/", b"", kind=b"\0") + OTHER + END, SAME),
    "folder_of_old_tar_with_a_size": (header(b"d/", 77, b"\0") + OTHER + END, SAME),
    "folder_with_a_size": (header(b"d/", 77, b"5") + OTHER + END, SAME),
    "folder_with_data": (member(b"d/", kind=b"5") + OTHER + END, "not a tar header"),
    "file_with_a_slash_at_its_end": (member(b"a.jpg/") + OTHER + END, SAME),
    "hard_link_with_a_size": (pair() + header(b"b.jpg", 6, b"1", b"a.jpg") + OTHER + END, SAME),
    "hard_link_with_data": (pair() + member(b"b.jpg", kind=b"1", link=b"a.jpg") + OTHER + END, "not a tar header"),
    "devices": (header(b"a.jpg", 0, b"3") + header(b"b.jpg", 0, b"4") + header(b"c.jpg", 0, b"6") + OTHER + END, SAME),
    # -- names ---------------------------------------------------------------------------------------------------------
    "absolute_names": (names(b"/a.jpg", b"/a.txt", b"/d/b.jpg") + END, SAME),
    "names_above": (names(b"../a.jpg", b"../a.txt", b"d/../b.jpg", b"..") + END, SAME),
    "names_with_a_dot_folder": (names(b"./a.jpg", b"./a.txt", b"a.jpg", b"././b.jpg") + END, SAME),
    "names_with_two_slashes": (names(b"d//a.jpg", b"d//a.txt", b"d/a.jpg", b"//b.jpg") + END, SAME),
    "names_that_end_with_spaces": (names(b"a.jpg ", b"a.txt", b" b.jpg", b"b.jpg") + END, SAME),
    "names_with_control_bytes": (names(b"a\t.jpg", b"a\t.txt", b"b\x01.jpg", b"c\r.jpg") + END, SAME),
    "names_without_a_key": (names(b".jpg", b"d/.jpg", b"..jpg", b"a..jpg", b"a.jpg") + END, SAME),
    "names_in_other_normal_forms": (names("é.jpg".encode(), "é.txt".encode(), "e\u0301.jpg".encode()) + END, SAME),
    "name_that_is_empty": (names(b"") + OTHER + END, SAME),
    "names_with_dots_in_folders": (names(b"v1.0/a.jpg", b"v1.0/a.txt", b"v1.0", b"v1.0.jpg", b".d/a.jpg") + END, SAME),
    "extensions_of_capital_letters": (names("a.JPÉG".encode(), b"a.TXT", "b.İ".encode(), "c.ß".encode()) + END, SAME),
    "names_that_differ_by_case": (names(b"A.jpg", b"a.jpg", b"A.txt", b"a.txt") + END, SAME),
    "key_member": (names(b"a.jpg", b"a.__key__", b"a.txt") + END, "__key__, a name that webdataset sets"),
    "url_member": (names(b"a.__url__", b"a.jpg") + END, "__url__, a name that webdataset sets"),
    "local_path_member": (names(b"a.jpg", b"a.__local_path__", b"a.txt") + END, SAME),
    "local_path_member_first": (names(b"a.__local_path__", b"a.jpg") + END, SAME),
    "names_like_key": (
        names(b"__key__", b"__key__.jpg", b"d/__key__.jpg", b"d/__key__.txt", b"a.jpg.__key__") + END,
        SAME,
    ),
    "bad_as_a_name": (names(b"__bad__.jpg", b"__bad__.txt", b"a.jpg", b"a.jpg.__bad__") + END, SAME),
    "bad_first": (names(b"a.__bad__", b"a.jpg", b"b.jpg") + END, "marked as bad"),
    "bad_of_capital_letters": (names(b"a.jpg", b"a.__BAD__", b"b.jpg") + END, "marked as bad"),
    "bad_without_content": (member(b"a.jpg") + member(b"a.__bad__", b"") + OTHER + END, SAME),
    "keys_that_repeat": (pair() + pair(b"b") + pair() + END, SAME),
    "members_that_repeat": (pair() + pair() + END, "holds two members jpg"),
    "members_that_alternate": (names(b"a.jpg", b"b.jpg", b"a.txt", b"b.txt", b"a.jpg") + END, SAME),
    "a_member_between_those_of_a_sample": (names(b"a.jpg", b"README", b"__x__", b"a.txt") + END, SAME),
    "prefix_of_155_bytes": (pair(prefix=b"p" * 155) + OTHER + END, SAME),
    "prefix_alone": (member(b"", prefix=b"a.jpg") + OTHER + END, SAME),
    # -- pax -----------------------------------------------------------------------------------------------------------
    "pax_name_that_is_empty": (pax(path=b"") + member(b"a.jpg") + OTHER + END, SAME),
    "pax_name_with_a_zero_byte": (pax(path=b"a\0b.jpg") + member(b"c.jpg") + OTHER + END, SAME),
    "pax_name_with_a_slash_at_its_end": (pax(path=b"a.jpg/") + member(b"c.jpg") + OTHER + END, SAME),
    "pax_name_with_an_equals_sign": (pax(path=b"a=b.jpg") + member(b"c.jpg") + OTHER + END, SAME),
    "pax_name_that_is_no_utf8": (pax(path=b"\xff.jpg") + member(b"c.jpg") + OTHER + END, SAME),
    "pax_name_in_binary": (pax(hdrcharset=b"BINARY", path=b"\xff.jpg") + member(b"c.jpg") + OTHER + END, SAME),
    "pax_name_twice": (
        member(b"p", record("path", b"a.jpg") + record("path", b"b.jpg"), b"x") + member(b"c.jpg") + END,
        SAME,
    ),
    "pax_name_over_a_prefix": (pax(path=b"a.jpg") + member(b"c.jpg", prefix=b"d") + OTHER + END, SAME),
    "pax_attribute_like_a_record": (
        pax(SCHILY_xattr_user_note=b"x\n18 path=b.jpg\n") + member(b"a.jpg") + OTHER + END,
        SAME,
    ),
    "pax_size": (pax(size=b"6") + member(b"a.jpg", b"of jpg", size=0) + OTHER + END, SAME),
    "pax_size_with_a_sign": (
        pax(size=b"+6") + member(b"a.jpg", b"of jpg", size=0) + OTHER + END,
        "a size that is not a number",
    ),
    "pax_size_of_a_folder": (pax(size=b"600") + header(b"d/", 0, b"5") + OTHER + END, SAME),
    "pax_times": (pax(mtime=b"1700000000.123456789", atime=b"-1.5", ctime=b"1e9") + pair() + OTHER + END, SAME),
    "pax_time_that_is_no_number": (pax(mtime=b"now") + pair() + OTHER + END, SAME),
    "pax_header_without_records": (member(b"p", b"", b"x") + pair() + OTHER + END, SAME),
    "pax_header_padded_by_zeros": (
        member(b"p", record("path", b"a.jpg") + bytes(9), b"x") + member(b"c.jpg") + END,
        SAME,
    ),
    "pax_record_without_a_line_end": (
        member(b"p", b"13 path=a.jpgX", b"x") + member(b"c.jpg") + END,
        "a damaged pax header",
    ),
    "pax_record_with_zeros_before_its_length": (
        member(b"p", b"0016 path=a.jpg\n", b"x") + member(b"c.jpg") + END,
        SAME,
    ),
    "pax_record_too_long": (member(b"p", b"999 path=a.jpg\n", b"x") + member(b"c.jpg") + END, "a damaged pax header"),
    "pax_headers_in_a_row": (pax(comment=b"1") + pax(path=b"a.jpg") + member(b"c.jpg") + OTHER + END, SAME),
    "pax_global_comment": (pax(b"g", comment=b"0123abcd") + pair() + OTHER + END, SAME),
    "pax_global_between_members": (member(b"a.jpg") + pax(b"g", comment=b"x") + member(b"a.txt") + OTHER + END, SAME),
    "pax_global_at_the_end": (pair() + pax(b"g", comment=b"x") + END, "an extension header without its member"),
    "pax_global_name": (pax(b"g", path=b"b.jpg") + pair() + END, "a global header that names"),
    "pax_global_size": (pax(b"g", size=b"6") + pair() + END, "a global header that names"),
    "pax_global_character_set": (
        pax(b"g", hdrcharset=b"BINARY") + pax(path=b"\xff.jpg") + member(b"c.jpg") + END,
        SAME,
    ),
    "pax_global_over_pax": (pax(b"g", mtime=b"1") + pax(path=b"a.jpg") + member(b"c.jpg") + OTHER + END, SAME),
    "pax_sparse": (
        pax(GNU_sparse_major=b"1", GNU_sparse_minor=b"0", GNU_sparse_name=b"a.jpg") + member(b"c.jpg") + END,
        "sparse",
    ),
    # -- long names of GNU ---------------------------------------------------------------------------------------------
    "long_name_that_is_short": (gnu(b"L", b"a.jpg\0") + member(b"c.jpg") + OTHER + END, SAME),
    "long_name_without_an_end": (gnu(b"L", b"a.jpg") + member(b"c.jpg") + OTHER + END, SAME),
    "long_name_that_is_empty": (gnu(b"L", b"\0") + member(b"c.jpg") + OTHER + END, SAME),
    "long_name_with_a_slash_at_its_end": (gnu(b"L", b"a.jpg/\0") + member(b"c.jpg") + OTHER + END, SAME),
    "long_link": (gnu(b"K", b"k" * 200 + b"\0") + header(b"a.jpg", 0, b"2", b"k" * 100) + OTHER + END, SAME),
    "long_link_and_name": (
        gnu(b"K", b"k" * 200 + b"\0") + gnu(b"L", b"l" * 200 + b".jpg\0") + header(b"l" * 100, 0, b"2") + OTHER + END,
        SAME,
    ),
    "long_name_twice": (
        gnu(b"L", b"a.jpg\0") + gnu(b"L", b"b.jpg\0") + member(b"c.jpg") + END,
        "two extension headers",
    ),
    "long_name_and_pax_name": (
        gnu(b"L", b"a.jpg\0") + pax(path=b"b.jpg") + member(b"c.jpg") + END,
        "two extension headers",
    ),
    "pax_name_and_long_name": (
        pax(path=b"b.jpg") + gnu(b"L", b"a.jpg\0") + member(b"c.jpg") + END,
        "two extension headers",
    ),
    "long_name_and_pax_size": (
        gnu(b"L", b"a.jpg\0") + pax(size=b"6") + member(b"c.jpg", b"of jpg", size=0) + OTHER + END,
        SAME,
    ),
    "long_name_at_the_end": (pair() + gnu(b"L", b"a.jpg\0") + END, "an extension header without its member"),
    # -- ends ----------------------------------------------------------------------------------------------------------
    "one_zero_block_at_the_end": (pair() + bytes(512), SAME),
    "no_zero_block_at_the_end": (pair(), "no end mark"),
    "a_part_of_a_zero_block_at_the_end": (pair() + bytes(100), "header cut off"),
    "zeros_that_are_no_whole_blocks": (pair() + bytes(1024 + 100), SAME),
    "a_zero_block_in_the_middle": (pair() + bytes(512) + OTHER + END, "data after a zeroed header"),
    "two_zero_blocks_in_the_middle": (pair() + END + OTHER + END, "data after a zeroed header"),
    "a_zero_block_at_the_beginning": (bytes(512) + pair() + END, "data after a zeroed header"),
    "a_byte_at_the_beginning": (b"\n" + pair() + END, "not a tar header"),
    "garbage_far_after_the_end": (pair() + bytes(1 << 16) + b"x" + bytes(1 << 16), "data after a zeroed header"),
    "a_signature_after_the_end": (pair() + END + b"-----BEGIN PGP SIGNATURE-----\n", "data after a zeroed header"),
    "padding_that_is_not_zero": (header(b"a.jpg", 1) + b"x" * 512 + OTHER + END, SAME),
    "data_like_a_header": (member(b"a.jpg", header(b"b.jpg", 3)) + OTHER + END, SAME),
    "data_of_zeros": (member(b"a.jpg", bytes(5000)) + OTHER + END, SAME),
    "data_of_whole_blocks": (member(b"a.jpg", b"y" * 1024) + OTHER + END, SAME),
    # -- other files that are called tar -------------------------------------------------------------------------------
    "gzip_in_parts": (gzip.compress(pair()) + gzip.compress(END), "compressed with gzip"),
    "zip": (_zip(), "a zip archive"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(600), "compressed with zstd"),
    "lz4": (b"\x04\x22\x4d\x18" + bytes(600), "not a tar header"),
    "compress": (b"\x1f\x9d\x90" + bytes(600), "not a tar header"),
    "html": (b"<!DOCTYPE html><html>404 Not Found</html>".ljust(2000), "not a tar header"),
    "xml_of_a_bucket": (b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code></Error>', "header cut off"),
    "cpio": (b"070701" + b"0" * 600, "not a tar header"),
    "ar": (b"!<arch>\n" + b"x" * 600, "not a tar header"),
    "one_byte": (b"\0", "header cut off"),
    "a_header_alone": (header(b"a.jpg", 0), "no end mark"),
}
