//! Chat templates that came with a download: whatever they do ends in one sentence, and the conversation goes on.

mod common;

use std::time::Duration;

use common::{Cut, Numbers, host_program, seed, text};
use dim::host::template::dialogue::{Answer, Dialogue, ToolChoice};
use dim::host::template::{CHATML, ChatTemplate, Role, TemplateError, Turn};

/// Templates are read by the real program, as its own are.
fn template(source: &str) -> Result<ChatTemplate, TemplateError> {
    dim::stage::trial::with(host_program().to_owned());
    ChatTemplate::new(source, "<s>", "</s>")
}

fn said(content: &str) -> [Turn; 1] {
    [Turn { role: Role::User, content: content.to_owned() }]
}

fn render(source: &str) -> Result<String, TemplateError> {
    template(source)?.render(&said("hello"))
}

/// `before`, then as often `piece` as there is room for in a template, then `after`.
fn chain(before: &str, piece: &str, after: &str) -> String {
    let room = 256 * 1024 - before.len() - after.len();
    format!("{before}{}{after}", piece.repeat(room / piece.len()))
}

/// In one step of the interpreter each, or in few.
fn slow() -> Vec<String> {
    vec![
        chain("{{ 1", "~1", " }}"),
        chain("{{ a", " or a", " }}"),
        "{% set ns = namespace(s=[1]) %}{% for i in range(34) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s | length }}"
            .into(),
    ]
}

#[test]
fn a_template_that_takes_too_long_is_given_up() {
    std::thread::scope(|scope| {
        for source in slow() {
            scope.spawn(move || {
                let error = render(&source).unwrap_err();
                let head: String = source.chars().take(60).collect();
                assert!(
                    matches!(error, TemplateError::Slow | TemplateError::TooMuchMemory),
                    "{head}: {error}"
                );
            });
        }
    });
}

#[test]
fn chains_of_any_length_are_read_or_refused() {
    for (before, piece, after) in [
        ("{{ 1", "+1", " }}"),
        ("{{ messages", ".a", " }}"),
        ("{{ 1", "|int", " }}"),
        ("{% if a %}", "{% elif a %}", "{% endif %}"),
        ("{{ ", "(", " }}"),
        ("{{ 1", "**1", " }}"),
        ("{{ ", "not ", "1 }}"),
    ] {
        let rendered = render(&chain(before, piece, after));
        assert!(matches!(rendered, Ok(_) | Err(TemplateError::Failed(_))), "{piece}: {rendered:?}");
    }
    let terms = format!("{{{{ 1{} }}}}", "+1".repeat(27_999));
    assert_eq!(render(&terms).as_deref(), Ok("28000"));
}

#[test]
#[cfg(target_os = "linux")]
fn a_template_has_no_more_memory_than_it_needs() {
    let growing = "{% set ns = namespace(s='0123456789abcdef') %}{% for i in range(40) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}";
    let lists = "{% for i in range(90000) %}{% set ns.s = ns.s + [range(9000) | list] %}{% endfor %}";
    let lists = format!("{{% set ns = namespace(s=[]) %}}{lists}");
    let nested = "{% set ns = namespace(s=[]) %}{% for i in range(100000) %}{% for j in range(10) %}{% set ns.s = [ns.s] \
                  %}{% endfor %}{% endfor %}";
    for source in [growing, lists.as_str(), nested] {
        let rendered = render(source);
        assert!(rendered.is_err() || source == nested, "{source}: {rendered:?}");
    }
    let error = render("{{ messages | tojson(indent=1000000) }}").unwrap_err().to_string();
    assert!(error.contains("an indent of at most 64"), "{error}");
}

/// It has no keys, no files, no sockets and no environment; and it ends with the conversation.
#[test]
#[cfg(target_os = "linux")]
fn a_template_s_process_has_nothing_but_its_pipes() {
    // what a program has open, and what it was started with: a copy of that is not closed by exec
    let inherited = std::fs::File::open(std::env::current_exe().unwrap()).unwrap();
    rustix::io::fcntl_setfd(&inherited, rustix::io::FdFlags::empty()).unwrap();
    let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let key = std::fs::File::open(std::env::current_exe().unwrap()).unwrap();
    let template = template(CHATML).unwrap();
    let me = std::process::id();
    let children = || -> Vec<u32> {
        let pids =
            std::fs::read_dir("/proc").unwrap().filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok());
        let is_mine = |pid: &u32| {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let arguments = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            status.contains(&format!("PPid:\t{me}\n")) && text(&arguments).contains("__template")
        };
        pids.filter(is_mine).collect()
    };
    template.render(&said("hello")).unwrap();
    // those of other tests come and go
    let mine = children();
    assert!(!mine.is_empty());
    for pid in mine {
        let of = |what: &str| format!("/proc/{pid}/{what}");
        let open = || -> Vec<String> {
            let files = std::fs::read_dir(of("fd")).into_iter().flatten();
            files
                .filter_map(|e| Some(std::fs::read_link(e.ok()?.path()).ok()?.display().to_string()))
                .collect()
        };
        // one of another test may be about to close them, or gone
        let is_bare = |open: &[String]| open.len() <= 3 && open.iter().all(|file| file.starts_with("pipe:"));
        let is_bare = (0..100).any(|_| {
            is_bare(&open()) || {
                std::thread::sleep(Duration::from_millis(100));
                false
            }
        });
        assert!(is_bare, "{:?}", open());
        let environment = std::fs::read(of("environ")).unwrap_or_default();
        for variable in environment.split(|&byte| byte == 0).filter(|variable| !variable.is_empty()) {
            let name = text(variable).split('=').next().unwrap().to_owned();
            assert!(["TZ", "TZDIR", "LD_LIBRARY_PATH"].contains(&name.as_str()), "{name}");
        }
    }
    drop((template, socket, key, inherited));
}

#[test]
fn one_process_serves_a_conversation_and_is_replaced_when_it_has_failed() {
    let bomb = "{{ 'x' * 100 }}{% if 'bomb' in messages[-1].content %}{% set ns = namespace(s=[1]) %}\
                {% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s | list | length }}{% endif %}\
                {{ messages[-1].content }}";
    let template = template(bomb).unwrap();
    for _ in 0..2 {
        let start = std::time::Instant::now();
        for i in 0..20 {
            assert!(template.render(&said(&format!("turn {i}"))).unwrap().ends_with(&format!("turn {i}")));
        }
        println!(
            "{:?} a turn, the first of 20 with the start of the process or without",
            start.elapsed() / 20
        );
        let error = template.render(&said("bomb")).unwrap_err();
        assert!(matches!(error, TemplateError::TooMuchMemory | TemplateError::Slow), "{error:?}");
    }
    // what a person says may be as large as it likes
    let long = "x\n\"\u{1f642}".repeat(500_000);
    assert!(template.render(&said(&long)).unwrap().ends_with(&long));
}

/// Pieces of Jinja in any order: most of it is no template, and the rest does odd things.
#[test]
fn random_templates_end_in_a_text_or_a_sentence() {
    let pieces = [
        "{{",
        "}}",
        "{%",
        "%}",
        "{#",
        "#}",
        " if ",
        " else ",
        " elif ",
        " endif ",
        " for ",
        " in ",
        " endfor ",
        " set ",
        " endset ",
        " macro f(a) ",
        " endmacro ",
        " call ",
        " endcall ",
        " filter ",
        " endfilter ",
        " with ",
        " endwith ",
        " generation ",
        " endgeneration ",
        " raw ",
        " endraw ",
        " block b ",
        " endblock ",
        " include ",
        " recursive ",
        "messages",
        "loop",
        "ns",
        "namespace()",
        "range(99999)",
        "range(1, 9, -1)",
        "loop(messages)",
        "f(f)",
        "self.b()",
        "1",
        "-1",
        "0",
        "1e308",
        "9223372036854775807",
        "'x'",
        "'%'",
        "''",
        "[",
        "]",
        "(",
        ")",
        "{",
        "}",
        ":",
        ",",
        ".",
        "|",
        "~",
        "+",
        "-",
        "*",
        "**",
        "/",
        "//",
        "%",
        "==",
        "<",
        " and ",
        " or ",
        " not ",
        " is ",
        "defined",
        "upper",
        "join",
        "sort",
        "unique",
        "tojson",
        "indent(9999999)",
        "replace('','x')",
        "format(1)",
        "list",
        "batch(0)",
        "slice(0)",
        "round(9999)",
        "center(99999999)",
        "[::-1]",
        "[::0]",
        "[0:99:-1]",
        ".items()",
        ".split('')",
        ".format('{}')",
        " if 1 else 2",
        "strftime_now('%')",
        "raise_exception('x')",
        "dictsort",
        "groupby('a')",
        "min",
        "max",
        "sum",
        "int",
        "float",
        "\n",
    ];
    let mut numbers = Numbers(seed());
    let mut rendered = 0;
    for _ in 0..400 {
        let mut source = String::new();
        for _ in 0..1 + numbers.below(3) {
            let expression: String = (0..1 + numbers.below(6))
                .map(|_| pieces[numbers.below(pieces.len() as u64) as usize])
                .collect();
            match numbers.below(4) {
                0 => source += &expression,
                1 => {
                    source +=
                        &format!("{{% for m in messages %}}{{{{ m.content {expression} }}}}{{% endfor %}}")
                }
                2 => source += &format!("{{{{ 'a%s{{}}' | {expression} }}}}"),
                _ => source += &format!("{{{{ {expression} }}}}"),
            }
        }
        match render(&source) {
            Ok(_) => rendered += 1,
            Err(TemplateError::Died(how)) => panic!("{source:?} ended its process: {how}"),
            Err(_) => {}
        }
    }
    println!("{rendered} of 400 are templates");
    assert!(rendered > 10, "{rendered}");
}

/// What a chat with this template says, as [`Cut::chat`].
fn chat(cut: &Cut, template: &str, input: &str) -> (String, String, Option<i32>) {
    let file = cut.folder.path().join("template.jinja");
    std::fs::write(&file, template).unwrap();
    let args = ["--ctx", "256", "-n", "3", "--chat-template", file.to_str().unwrap()];
    cut.chat(&args, input.as_bytes())
}

#[test]
fn no_template_ends_a_chat() {
    let cut = Cut::tiny("qwen2");
    let chatml = CHATML.replace('\n', "\\n");
    // the second message makes it run away; the first and the third are answered
    let now_and_then = format!(
        "{{% if messages[-1].content == 'two' %}}{{% set ns = namespace(s=[1]) %}}{{% for i in range(60) %}}\
         {{% set ns.s = ns.s + ns.s %}}{{% endfor %}}{{{{ ns.s | length }}}}{{% endif %}}{chatml}"
    );
    let (out, err, code) = chat(&cut, &now_and_then, "one\ntwo\nthree\n");
    assert_eq!((out.lines().count(), code), (2, Some(2)), "{out}{err}");
    assert!(
        err.contains("error: this model's chat template ") && err.contains("hint: `--chat-template"),
        "{err}"
    );
    assert!(err.contains("did not take 1 message\n"), "{err}");
    // every one: a script is told
    let (out, err, code) = chat(&cut, &chain("{{ 1", "~1", " }}"), "one\n");
    assert_eq!((out.as_str(), code), ("", Some(2)), "{err}");
    assert!(err.contains("error: this model's chat template took longer than 5 s\n"), "{err}");
    // one that cannot be read is known before the first message
    let (out, err, code) = chat(&cut, "{% for %}", "one\n");
    assert_eq!((out.as_str(), code), ("", Some(2)), "{err}");
    assert_eq!(err.lines().filter(|line| line.starts_with("error:")).count(), 1, "{err}");
}

const TOOL: &str = r#"{"type": "function", "function": {"name": "weather", "description": "",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}"#;

fn with_tools(tool: &str) -> Dialogue {
    Dialogue {
        messages: vec![serde_json::json!({"role": "user", "content": "What is it like in Paris?"})],
        tools: vec![serde_json::from_str(tool).unwrap()],
        tool_choice: ToolChoice::Required,
        ..Dialogue::default()
    }
}

const HERMES: &str = include_str!("../llama-sys-patch/tests/templates/hermes.jinja");

#[test]
fn a_dialogue_with_tools_comes_back_with_what_reads_its_answer() {
    let hermes = template(HERMES).unwrap();
    let prepared = hermes.prepare(&with_tools(TOOL)).unwrap();
    assert!(prepared.prompt.contains("\"weather\"") && prepared.prompt.ends_with("<|im_start|>assistant\n"));
    assert!(prepared.takes_tools && prepared.grammar.contains("root ::=") && prepared.triggers.is_empty());
    let mut answer = Answer::new(&prepared.parser).unwrap();
    let spoken = "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Paris\"}}\n</tool_call>";
    let (mut arguments, mut names) = (String::new(), 0);
    for piece in spoken.split_inclusive(' ') {
        let new = answer.push(piece);
        assert_eq!(new.content, "");
        names += usize::from(new.calls.first().is_some_and(|call| !call.name.is_empty()));
        new.calls.iter().for_each(|call| arguments.push_str(&call.arguments));
    }
    answer.finish().calls.iter().for_each(|call| arguments.push_str(&call.arguments));
    assert!(names > 0);
    assert_eq!(answer.message().calls[0].name, "weather");
    assert_eq!(arguments, answer.message().calls[0].arguments);
    assert_eq!(serde_json::from_str::<serde_json::Value>(&arguments).unwrap()["city"], "Paris");
    // what opens more brackets than the parser follows is said to its end; marks that are none of JSON's are no brackets
    for said in ["x < y; ".repeat(3_000), format!("See: {}", "[".repeat(3_000))] {
        let mut answer = Answer::new(&prepared.parser).unwrap();
        let pieces = said.as_bytes().chunks(700).map(|piece| std::str::from_utf8(piece).unwrap());
        let mut told: String = pieces.map(|piece| answer.push(piece).content).collect();
        assert!(!told.is_empty());
        told.push_str(&answer.finish().content);
        assert_eq!((told.trim(), &answer.message().content), (said.trim(), &told));
    }
    // the plain engine and this one agree on a plain conversation
    let plain = Dialogue { tools: Vec::new(), tool_choice: ToolChoice::Auto, ..with_tools(TOOL) };
    let rendered = hermes.render(&said("What is it like in Paris?")).unwrap();
    assert_eq!(hermes.prepare(&plain).unwrap().prompt, rendered);
    assert_eq!(
        template(CHATML).unwrap().prepare(&plain).unwrap().prompt,
        template(CHATML).unwrap().render(&said("What is it like in Paris?")).unwrap()
    );
}

/// llama.cpp's engine has no limits: those of its process are all there are.
#[test]
fn a_template_made_to_kill_the_other_engine_ends_with_a_sentence_too() {
    let dialogue = with_tools(TOOL);
    for source in [
        "{% macro m() %}{{ m() }}{% endmacro %}{% if tools %}{{ m() }}{% endif %}",
        "{% if tools %}{% for a in range(99999999) %}{{ a }}{% endfor %}{% endif %}",
        "{% if tools %}{% set ns = namespace(s='0123456789abcdef') %}{% for i in range(40) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{% endif %}",
        "{% if tools %}{{ raise_exception('not with tools') }}{% endif %}{{ messages[0].content }}",
    ] {
        let Ok(template) = template(source) else { continue };
        let prepared = template.prepare(&dialogue);
        assert!(prepared.is_err(), "{source}: {prepared:?}");
        assert!(prepared.unwrap_err().to_string().starts_with("this model's chat template"), "{source}");
        // and the conversation goes on
        let plain = template.render(&said("hello"));
        assert!(
            matches!(plain, Ok(_) | Err(TemplateError::Failed(_) | TemplateError::Endless)),
            "{source}: {plain:?}"
        );
    }
    // a schema that would take minutes
    let many: Vec<String> = (0..4_000).map(|i| format!("\"p{i}\": {{}}")).collect();
    let tool = TOOL
        .replace("\"city\": {\"type\": \"string\"}", &many.join(","))
        .replace("\"required\": [\"city\"]", "\"required\": []");
    let prepared = template(HERMES).unwrap().prepare(&with_tools(&tool));
    assert!(
        matches!(
            prepared,
            Ok(_)
                | Err(TemplateError::Slow
                    | TemplateError::TooMuchMemory
                    | TemplateError::TooMuchText
                    | TemplateError::Failed(_))
        ),
        "{prepared:?}"
    );
}
