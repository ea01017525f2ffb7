//! Markdown as elements and texts, for the page: `POST /markdown`, the text as the body.
//!
//! A list: a string is a text, `{"open": NAME}` begins an element, `null` ends the one that was begun last. The page makes
//! exactly these elements, by their names, and puts texts into them as texts. So nothing that a model says is ever read as
//! HTML, there is no sanitiser that could be wrong, and the page's policy can forbid all of it. HTML in a reply is text;
//! pictures are links to them; a link leads to `http`, `https` or `mailto`, or is text.

use pulldown_cmark::{CodeBlockKind, Event, HeadingLevel, Options, Parser, Tag, TagEnd};
use serde_json::{Value, json};

/// Most bytes of a text that is rendered.
pub(crate) const MAX_BYTES: usize = 256 * 1024;
/// Most elements and texts: the cells that a table's short rows lack can be more than its text has bytes.
const MAX_PIECES: usize = 200_000;

/// `text` as the page builds it; `None`: it has too many parts.
pub(crate) fn pieces(text: &str) -> Option<Vec<Value>> {
    let mut out = Vec::new();
    let mut in_head = false;
    for event in Parser::new_ext(text, Options::ENABLE_TABLES | Options::ENABLE_STRIKETHROUGH) {
        match event {
            Event::Start(Tag::Table(_)) => out.push(open("table")),
            Event::Start(Tag::TableHead) => {
                in_head = true;
                out.extend([open("thead"), open("tr")]);
            }
            Event::Start(Tag::TableCell) => out.push(open(if in_head { "th" } else { "td" })),
            Event::End(TagEnd::TableHead) => {
                in_head = false;
                out.extend([Value::Null, Value::Null, open("tbody")]);
            }
            Event::End(TagEnd::Table) => out.extend([Value::Null, Value::Null]),
            Event::Start(Tag::CodeBlock(kind)) => {
                let language = match &kind {
                    CodeBlockKind::Fenced(info) => info.split([' ', ',']).next().unwrap_or_default(),
                    CodeBlockKind::Indented => "",
                };
                out.push(json!({"open": "pre", "language": language}));
                out.push(open("code"));
            }
            Event::End(TagEnd::CodeBlock) => out.extend([Value::Null, Value::Null]),
            Event::Start(tag) => out.extend(element(tag)),
            Event::End(TagEnd::HtmlBlock | TagEnd::MetadataBlock(_)) => {}
            Event::End(_) => out.push(Value::Null),
            Event::Code(text) | Event::InlineMath(text) | Event::DisplayMath(text) => {
                out.extend([open("code"), text.as_ref().into(), Value::Null]);
            }
            Event::Text(text)
            | Event::Html(text)
            | Event::InlineHtml(text)
            | Event::FootnoteReference(text) => {
                out.push(text.as_ref().into());
            }
            Event::SoftBreak => out.push("\n".into()),
            Event::HardBreak => out.extend([open("br"), Value::Null]),
            Event::Rule => out.extend([open("hr"), Value::Null]),
            Event::TaskListMarker(is_done) => out.push(if is_done { "☑ " } else { "☐ " }.into()),
        }
        if out.len() > MAX_PIECES {
            return None;
        }
    }
    Some(out)
}

fn open(name: &str) -> Value {
    json!({"open": name})
}

/// What begins with a tag; `None`: nothing, and its end is none either.
fn element(tag: Tag<'_>) -> Option<Value> {
    Some(match tag {
        Tag::HtmlBlock | Tag::MetadataBlock(_) => return None,
        // above them stand the page's own
        Tag::Heading { level, .. } => match level {
            HeadingLevel::H1 => open("h3"),
            HeadingLevel::H2 => open("h4"),
            HeadingLevel::H3 => open("h5"),
            _ => open("h6"),
        },
        Tag::BlockQuote(_) => open("blockquote"),
        Tag::List(None) => open("ul"),
        Tag::List(Some(start)) => json!({"open": "ol", "start": start}),
        Tag::Item => open("li"),
        Tag::Emphasis => open("em"),
        Tag::Strong => open("strong"),
        Tag::Strikethrough => open("del"),
        Tag::TableRow => open("tr"),
        Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. } => match leads_out(&dest_url) {
            true => json!({"open": "a", "href": dest_url.as_ref()}),
            false => open("span"),
        },
        Tag::Paragraph => open("p"),
        // none of these is asked for
        _ => open("span"),
    })
}

/// Whether a link may be one. Relative ones would lead to this server.
fn leads_out(url: &str) -> bool {
    let scheme = url.split_once(':').map_or("", |(scheme, _)| scheme);
    ["http", "https", "mailto"].iter().any(|allowed| scheme.eq_ignore_ascii_case(allowed))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// As it would be written in HTML.
    fn written(text: &str) -> String {
        let mut open = Vec::new();
        let mut out = String::new();
        for piece in pieces(text).unwrap() {
            match &piece {
                Value::Null => out += &format!("</{}>", open.pop().expect("one that was begun")),
                Value::String(text) => out += text,
                piece => {
                    let name = piece["open"].as_str().unwrap().to_owned();
                    out += &format!(
                        "<{name}{}>",
                        piece["href"].as_str().map(|h| format!(" {h}")).unwrap_or_default()
                    );
                    open.push(name);
                }
            }
        }
        assert_eq!(open, [""; 0], "{text:?}");
        out
    }

    #[test]
    fn texts_lists_code_and_tables_are_elements() {
        for (text, expected) in [
            ("a *b* **c** `d`\ne", "<p>a <em>b</em> <strong>c</strong> <code>d</code>\ne</p>"),
            ("# t\n- a\n- b", "<h3>t</h3><ul><li>a</li><li>b</li></ul>"),
            ("```rust\nlet a = \"<b>\";\n```", "<pre><code>let a = \"<b>\";\n</code></pre>"),
            (
                "|a|b|\n|-|-|\n|1|",
                "<table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr><td>1</td><td></td></tr></tbody></table>",
            ),
            ("[x](https://x.example/)", "<p><a https://x.example/>x</a></p>"),
            // a reply under way, in the middle of things
            ("1. a\n   ```\nlet", "<ol><li>a<pre><code></code></pre></li></ol><p>let</p>"),
        ] {
            assert_eq!(written(text), expected, "{text}");
        }
    }

    #[test]
    fn html_is_text_and_no_link_runs_a_script_or_stays_here() {
        assert_eq!(written("<script>alert(1)</script>"), "<script>alert(1)</script>");
        let only_text = |text: &str| {
            pieces(text).unwrap().iter().all(|p| !p.is_object() || p["open"] == "p" || p["open"] == "span")
        };
        for text in [
            "<img src=x onerror=alert(1)>",
            "a <b onclick=alert(1)>c</b>",
            "[x](javascript:alert(1))",
            "[x](JaVaScRiPt:alert(1))",
            "[x](data:text/html,x)",
            "[x](/v1/models)",
            "[x](//evil.example)",
            "![x](file:///etc/passwd)",
        ] {
            assert!(only_text(text), "{text}: {:?}", pieces(text));
        }
        assert_eq!(written("![alt](https://x.example/p.png)"), "<p><a https://x.example/p.png>alt</a></p>");
    }

    #[test]
    fn a_table_that_grows_beyond_its_text_is_refused() {
        let columns = 2_000;
        let text = format!("{}\n{}\n{}", "|a".repeat(columns), "|-".repeat(columns), "|\n".repeat(50_000));
        assert!(text.len() < MAX_BYTES && pieces(&text).is_none_or(|pieces| pieces.len() <= MAX_PIECES));
        assert_eq!(pieces(&"*a* ".repeat(MAX_BYTES / 4)), None);
    }

    proptest! {
        #[test]
        fn whatever_is_said_every_element_ends(text in "([-*_`~>#|\\[\\]()<!&:\n 1.a]|javascript:|<div>|\\|-\\|\n|\\PC){0,120}") {
            written(&text);
            for piece in pieces(&text).unwrap() {
                if let Some(name) = piece["open"].as_str() {
                    prop_assert!(ELEMENTS.contains(&name), "{name}");
                }
            }
        }
    }

    /// Those that the page knows.
    const ELEMENTS: [&str; 24] = [
        "a",
        "blockquote",
        "br",
        "code",
        "del",
        "em",
        "h3",
        "h4",
        "h5",
        "h6",
        "hr",
        "li",
        "ol",
        "p",
        "pre",
        "span",
        "strong",
        "table",
        "tbody",
        "td",
        "th",
        "thead",
        "tr",
        "ul",
    ];
}
