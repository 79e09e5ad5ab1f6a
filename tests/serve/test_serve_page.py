"""How the page's files are served: from the package only, with a strict policy."""

from __future__ import annotations

import web
from live import Live

from rorqual.serve.page_routes import read_page


def test_every_file_of_the_page_is_served_with_the_policy(live: Live) -> None:
    files = read_page()
    assert "index.html" in files
    for name, file in files.items():
        response = web.get(f"{live.url}/page/{name}")
        assert response.status_code == 200
        assert response.content == file.content
        assert response.headers["content-type"] == file.kind
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        for directive in ("frame-ancestors", "base-uri", "form-action"):  # which have no default
            assert f"{directive} 'none'" in policy
        assert response.headers["x-content-type-options"] == "nosniff"
    assert web.get(live.url + "/").content == files["index.html"].content


def test_an_unchanged_file_is_not_sent_again(live: Live) -> None:
    first = web.get(live.url + "/")
    again = web.get(live.url + "/", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    # A browser asks each time, so that a page of another version is never half of it.
    for response in (first, again, web.get(live.url + "/page/main.js")):
        assert response.headers["cache-control"] == "no-cache"
    assert again.headers["etag"] == first.headers["etag"]
    assert web.head(live.url + "/").status_code == 200


def test_nothing_else_is_served(live: Live) -> None:
    for path in ("/page/", "/page/app.py", "/page/%2e%2e%2fapp.py", "/page//etc/passwd"):
        assert web.get(live.url + path).status_code == 404
