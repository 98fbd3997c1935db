from toy import WORDS, toy_tokenizer

from llamalet.console import Page


def test_stories_follow_each_other_whatever_the_order_they_end_in(capsys):
    a, b, n, accent = (259 + WORDS.index(word) for word in ("a", "b", "n", "\u00e9"))
    page = Page(toy_tokenizer(), [1, a], [7, 8, 9])
    assert capsys.readouterr() == ("a", "seed 7\n")
    for number, token in ((0, b), (1, n), (2, b), (1, None), (0, a)):
        page.add(number, token)
    assert capsys.readouterr() == ("ba", "")
    page.add(0, None)
    assert capsys.readouterr() == ("\n\nan\n\nab", "seed 8\nseed 9\n")
    page.add(2, accent)
    assert capsys.readouterr().out == "\u00e9"
    page.add(2, None)
    page.close()
    assert capsys.readouterr() == ("\n", "")


def test_a_page_that_is_closed_shows_what_has_begun(capsys):
    page = Page(toy_tokenizer(), [1], range(9))
    for number in (0, 1, 2, 1):
        page.add(number, 259 + WORDS.index("a"))
    page.close()
    assert capsys.readouterr() == ("a\n\naa\n\na\n", "seed 0\nseed 1\nseed 2\n")
