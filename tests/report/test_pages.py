"""Pages: everything that is shown is escaped, and only what differs between two texts is marked."""

from __future__ import annotations

from twotower.report.pages import Card, Page, unfolding_examples


def test_a_page_escapes_its_parts_and_holds_its_data() -> None:
    page = Page(
        title="<model>: a question",
        subtitle="1 < 2",
        method="a & b",
        cards=[Card("quality", "<99 %", "as asked for", met=True), Card("speed", "2x", "")],
        sections={"A <heading>": "<p>kept as it is</p>"},
        data={"text": "</script>"},
    ).html()
    assert "<title>&lt;model&gt;: a question</title>" in page
    assert "<h2>A &lt;heading&gt;</h2>\n<p>kept as it is</p>" in page
    assert "1 &lt; 2" in page and "<footer>a &amp; b</footer>" in page
    assert '<div class="card good"><div class="figure">&lt;99 %</div>' in page
    assert '{"text": "\\u003c/script>"}' in page


def test_one_inserted_word_does_not_mark_the_words_behind_it() -> None:
    lost = [{"kind": "sort", "prompt": "p", "answer": "a b c", "diffusion": "a x b c"}]
    html = unfolding_examples(lost, "diffusion", "None.")
    assert "<pre>a b c</pre>" in html
    assert "<pre>a <mark>x</mark> b c</pre>" in html
    assert unfolding_examples([], "diffusion", "None.") == "<p>None.</p>"
