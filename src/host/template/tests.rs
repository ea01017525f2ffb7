use super::*;

fn turn(role: Role, content: &str) -> Turn {
    Turn { role, content: content.to_owned() }
}

fn render(source: &str) -> Result<String, TemplateError> {
    ChatTemplate::new(source, "<s>", "</s>")?.render(&[turn(Role::User, "x")])
}

#[test]
fn renders_chatml() {
    let t = ChatTemplate::new(CHATML, "", "").unwrap();
    assert_eq!(
        t.render(&[turn(Role::System, "Be brief."), turn(Role::User, "Hi")]).unwrap(),
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    );
}

#[test]
fn python_methods_and_exceptions_work_as_templates_expect() {
    let source = "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}[{{ m['content'].strip() | upper }}]{% endfor %}";
    let t = ChatTemplate::new(source, "<s>", "</s>").unwrap();
    assert_eq!(t.render(&[turn(Role::User, "  hi ")]).unwrap(), "<s>[HI]");
    let e = t.render(&[turn(Role::Assistant, "x")]).unwrap_err().to_string();
    assert!(e.contains("roles must alternate"), "{e}");
    let long = render("{{ raise_exception('x' * 100000) }}").unwrap_err().to_string();
    assert!(long.len() < 1000, "{} bytes", long.len());
}

#[test]
fn hostile_templates_end_with_an_error() {
    let endless =
        "{% for a in range(9999) %}{% for b in range(9999) %}{% set x = a * b %}{% endfor %}{% endfor %}";
    assert_eq!(render(endless), Err(TemplateError::Endless));
    let bomb =
        "{% for a in range(90000) %}{{ 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx' * 100 }}{% endfor %}";
    assert_eq!(render(bomb), Err(TemplateError::TooMuchText));
    assert!(render("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}").is_err());
    assert!(render("{% for %}").is_err());
    assert!(render("{% include '/etc/passwd' %}").is_err());
    assert!(matches!(
        render("{{ messages | tojson(indent=1000000) }}"),
        Err(TemplateError::Failed(why)) if why.contains("an indent of at most 64")
    ));
    assert!(render("{% set ns = namespace(s=[]) %}{% for i in range(999) %}{% set ns.s = [ns.s] %}{% endfor %}{{ ns.s | tojson }}").is_err());
    assert!(matches!(render(&"x".repeat(MAX_TEMPLATE_BYTES + 1)), Err(TemplateError::TooLong { .. })));
    assert_eq!(render("  "), Err(TemplateError::None));
}

/// The longest chain of every kind that a template of the size allowed has room for. (`~` and `or` are left out: at this
/// length they take minutes, which is what `tests/templates.rs` is about.)
#[test]
fn the_stack_is_large_enough_for_any_template() {
    let most = |before: &str, piece: &str, after: &str| {
        let room = MAX_TEMPLATE_BYTES - before.len() - after.len();
        let source = format!("{before}{}{after}", piece.repeat(room / piece.len()));
        (piece.to_owned(), render(&source))
    };
    let chains = [
        most("{{ 1", "+1", " }}"),
        most("{{ a", ".a", " }}"),
        most("{{ 1", "|int", " }}"),
        most("{{ a", "[0]", " }}"),
        most("{{ a", "()", " }}"),
        most("{{ 1", "**1", " }}"),
        most("{{ 1", "<1", " }}"),
        most("{{ 1", " is odd", " }}"),
        most("{% if a %}", "{% elif a %}", "{% endif %}"),
        most("{% for a in [1] %}", "{% if a %}", "{% endif %}{% endfor %}"),
        most("{{ ", "(", "1 }}"),
        most("{{ ", "[", "1 }}"),
        most("{{ ", "{1:", "1 }}"),
        most("{{ ", "not ", "1 }}"),
        most("{{ ", "-", "1 }}"),
        most("{{ 1", " if 1 else 1", " }}"),
        most("{{ 1 ", "if 1 ", " }}"),
        most("", "{% macro a() %}", ""),
        most("", "{% set a %}", ""),
        most("", "{% with a=1 %}", ""),
        most("", "{% filter upper %}", ""),
    ];
    for (piece, rendered) in chains {
        assert!(matches!(rendered, Ok(_) | Err(TemplateError::Failed(_))), "{piece:?}: {rendered:?}");
    }
}

#[test]
fn marks_of_what_is_trained_on_are_a_scope_and_nothing_else() {
    let rendered = |source: &str| render(source).unwrap();
    assert_eq!(rendered("a{% generation %}b{% endgeneration %}c"), "abc");
    assert_eq!(rendered("a {%- generation -%} b {%+ endgeneration %}\nc"), "ab c");
    assert_eq!(
        rendered("{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}"),
        "21"
    );
    assert_eq!(rendered("{% raw %}{% generation %}{% endraw %}"), "{% generation %}");
    assert_eq!(rendered("{{ '{% generation %}' }}{# {% generation %} #}"), "{% generation %}");
    assert_eq!(rendered("{{ '}}' }}{{ '\\'{% generation %}' }}"), "}}'{% generation %}");
    assert!(render("{% generation %}").is_err() && render("{% endgeneration %}").is_err());
    for odd in ["{", "{%", "{%}", "{{", "{#", "{%-%}", "x{%%}", "{% raw %}{% x"] {
        assert_eq!(jinja::without_generation_marks(odd), odd);
    }
}

#[test]
fn the_date_is_today_s() {
    let date = || dates::now("%d %b %Y %H");
    let (before, rendered, after) = (date(), render("{{ strftime_now('%d %b %Y %H') }}").unwrap(), date());
    assert!([before, after].contains(&rendered), "{rendered}");
}
