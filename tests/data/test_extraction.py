"""Extraction on small fixtures written by hand in the packages' formats, the R data by a writer of
its own.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from rorqual.data.extractors import manuals, prose, reference
from rorqual.data.extractors.rdata import load_lazy_database, load_rds
from rorqual.errors import DataError


def _characters(text: str) -> bytes:
    raw = text.encode()
    return struct.pack(">ii", 0x00040009 | 8 << 12, len(raw)) + raw


def _strings(values: list[str]) -> bytes:
    return struct.pack(">ii", 16, len(values)) + b"".join(map(_characters, values))


def _integers(values: list[int]) -> bytes:
    return struct.pack(f">ii{len(values)}i", 13, len(values), *values)


def _named_list(items: dict[str, bytes]) -> bytes:
    names = struct.pack(">i", 0x402) + struct.pack(">i", 1) + _characters("names")
    attributes = names + _strings(list(items)) + struct.pack(">i", 254)
    return struct.pack(">ii", 19 | 0x200, len(items)) + b"".join(items.values()) + attributes


def _serialised(body: bytes, version: int = 2) -> bytes:
    head = b"X\n" + struct.pack(">iii", version, 0x040201, 0x020300)
    return head + (struct.pack(">i", 5) + b"UTF-8" if version == 3 else b"") + body


def _pairlist(name: str, value: bytes) -> bytes:
    return struct.pack(">ii", 0x402, 1) + _characters(name) + value + struct.pack(">i", 254)


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("version", [2, 3])
def test_rds_in_every_compression(
    tmp_path: Path, pack: Callable[[bytes], bytes], version: int
) -> None:
    lines = ["EMMA", "", "naïve ‘words’"]
    (tmp_path / "d.rds").write_bytes(pack(_serialised(_pairlist("emma", _strings(lines)), version)))
    assert load_rds(tmp_path / "d.rds") == {"emma": lines}


def test_lazy_database(tmp_path: Path) -> None:
    lines = [f"line {n}" for n in range(50)]
    plain = _serialised(_strings(lines))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6}]
    blocks = {
        "z": zlib.compress(plain),
        "b": b"2" + bz2.compress(plain),
        "x": b"Z" + lzma.compress(plain, format=lzma.FORMAT_RAW, filters=filters),
    }
    raw, places = b"", {}
    for name, block in blocks.items():
        places[name] = _integers([len(raw), len(block) + 4])
        raw += struct.pack(">I", len(plain)) + block
    (tmp_path / "d.rdb").write_bytes(raw)
    index = _named_list({"variables": _named_list(places)})
    # The second "names" symbol is written out again here; R would write a reference: both are read.
    (tmp_path / "d.rdx").write_bytes(zlib.compress(_serialised(index)))
    assert load_lazy_database(tmp_path / "d") == dict.fromkeys(blocks, lines)


def test_broken_r_data(tmp_path: Path) -> None:
    whole = _serialised(_strings(["a", "b"]))
    for raw in (whole[:-3], b"nothing", whole[:2] + struct.pack(">i", 9) + whole[6:]):
        (tmp_path / "d.rds").write_bytes(raw)
        with pytest.raises(DataError) as caught:
            load_rds(tmp_path / "d.rds")
        assert caught.value.fix


def test_usfm_chapters() -> None:
    book = (
        "\\id RUT Ruth\n\\h Ruth \n\\mt1 Ruth \n\\c 1 \n\\p \n"
        "\\v 1 In the days\\f + \\ft a note\\f* of\n"
        'judges,  \\w famine|strong="H1"\\w* came . \n'
        "\\v 2 A man went.\n\\p\n\\v 3 He died.\n\\c 2\n"
        "\\q1\n\\v 1 A song\n\\q2 of two lines.\n"
    )
    assert list(prose.usfm_chapters(book)) == [
        "Ruth 1\n\nIn the days of judges, famine came. A man went.\n\nHe died.\n",
        "Ruth 2\n\nA song\nof two lines.\n",
    ]


def test_wordnet_sentences() -> None:
    whole = '00000002 03 n 01 whole 0 001 @ 00000001 n 0000 | an assemblage; "a whole"  '
    line = (
        "00003993 03 n 02 congener 0 live_one 0 001 @ 00000002 n 0000 | (biology) a whole of the "
        'same kind; "lard was used"; "why not?"  '
    )
    synsets = dict(reference.parse_synset(text, "noun") for text in (whole, line))
    assert reference.synset_sentences(synsets[3993], synsets) == (
        'In biology, the word "congener" means a whole of the same kind. Congener is a kind of '
        "whole. Another word for congener is live one. Lard was used. Why not?"
    )
    nod = "00016573 29 v 01 nod 2 001 @ 00016380 v 0000 02 + 01 00 + 02 00 | be almost asleep  "
    _, synset = reference.parse_synset(nod, "verb")
    assert reference.synset_sentences(synset, {}) == "To nod means to be almost asleep."


def test_dictd_entries() -> None:
    text = (
        "00-database-info\n   about\n\n.NET framework\n.NET\n\n   <language, tool> A {software\n"
        "   development} environment.\n\n   Second.\n\n   (2003-09-24)\n\nnext\n\n   Body.\n"
    )
    assert list(reference.dictd_entries(text)) == [
        ".NET framework, .NET\n\n(language, tool) A software development environment.\n\nSecond.\n",
        "next\n\nBody.\n",
    ]


def test_wikitext() -> None:
    text = (
        "{{Infobox|a={{b}}}}'''Asia''' is a [[continent|large continent]].<ref>x [[y]]</ref>\n"
        "[[File:a.png|thumb|a [[map]] of it]]\n{| class=x\n| cell\n|}\n== History ==\n* one<br/>\n"
        "== References ==\nnothing"
    )
    assert prose.plain_wikitext(text) == ("Asia is a large continent.\n\nHistory\n\n- one")


def test_html_text() -> None:
    page = (
        "<html><head><title>no</title></head><body><ul class='docnav'><li>Prev</li></ul><h2>1. A"
        "</h2><div>Some <b>bold</b>\n text &amp; more.</div><ul><li>item</li></ul><pre>x\n  y</pre>"
    )
    assert manuals.html_text(page) == "1. A\n\nSome bold text & more.\n\n- item\n\nx\n  y"


def test_what_is_hidden_ends_with_its_own_end() -> None:
    page = (
        "<div class='docnav'>a<div>b<p>c</p><div>d</div></div>e<script>f</script>g</div>"
        "<p>Text.</p>"
        "<div id='banner'>h</div><p>More.</p><style>i</style>"
    )
    assert manuals.html_text(page) == "Text.\n\nMore."


def test_sections_leave_the_contents_out() -> None:
    body = "A sentence of the section itself. " * 20
    contents = "".join(f"{n}.1. Title\n" for n in range(1, 5))
    found = list(manuals.sections(f"Contents\n{contents}\n1.1. Title\n\n    {body}\n"))
    assert found == [f"1.1. Title\n\n{body.strip()}\n"]


def test_standard_library_is_code_without_tests() -> None:
    modules = list(manuals.python_stdlib(Path()))
    assert len(modules) > 200
    assert any("class JSONDecoder" in text for text in modules)
    assert not any("import test.support" in text for text in modules)
