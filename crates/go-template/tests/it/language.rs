use go_template::{Delimiters, Functions, Limits, Template, Value};

use crate::{check, check_error, check_parse_error, data};

#[test]
fn text_and_trimming() {
    check("a{{/* c */}}b", "ab");
    check("a {{- /* c */ -}} b", "ab");
    check("a \n\t {{- .a -}} \n b", "a1b");
    check("{{-3}} {{ 3 -}} x", "-3 3x");
    check_parse_error("{{/* c }}", "unclosed comment");
    check_parse_error("{{/* c */ }}", "comment ends before closing delimiter");
    check_parse_error("{{ .a", "unclosed action");
}

#[test]
fn constants() {
    check(
        r#"{{"a\tb\u00e9\x41"}} {{`raw\n`}} {{'a'}} {{0x1F}} {{07}} {{0b11}} {{1_000}}"#,
        "a\tbéA raw\\n 97 31 7 3 1000",
    );
    check("{{1.50}} {{1e3}} {{.5}} {{0x1p4}} {{1+2i}} {{true}}", "1.5 1000 0.5 16 (1+2i) true");
    check("{{1000000}} {{1000000.0}} {{1e21}} {{0.00001}} {{123456.0}}", "1000000 1e+06 1e+21 1e-05 123456");
    check_error("{{18446744073709551616}}", "overflows int");
    check_parse_error("{{1x}}", "bad number syntax");
    check_parse_error("{{08}}", "bad number syntax");
    check_parse_error("{{\"a\nb\"}}", "unterminated quoted string");
    check_error("{{nil}}", "nil is not a command");
}

#[test]
fn fields() {
    check("{{.n}} {{.nosuch}} {{.nosuch.more}} {{.nest.k.deep}}", "<no value> <no value> <no value> v");
    check("{{(index .nest.k.list 0).name}} {{$.a}} {{(.nest).k.deep}}", "p 1 v");
    check_error("{{.s.x}}", "can't evaluate field x in type interface {}");
    check_error("{{.a 1}}", "a has arguments but cannot be invoked as function");
    check_parse_error("{{\"x\".y}}", "unexpected . after term");
}

#[test]
fn variables_have_scopes() {
    check("{{$x := 1}}{{if true}}{{$x = 5}}{{end}}{{$x}}", "5");
    check("{{$x := 1}}{{if true}}{{$x := 5}}{{$x}}{{end}}{{$x}}", "51");
    check("{{$i := 0}}{{$x := 0}}{{range $i, $x = .ls}}{{end}}{{$i}}{{$x}}", "2z");
    check("{{with $v := .s}}{{$v}}{{end}}", "hello world");
    check_parse_error("{{$y}}", "undefined variable");
    check_error("{{$y = 1}}", "undefined variable");
    check_parse_error("{{if true}}{{$y := 1}}{{end}}{{$y}}", "undefined variable");
    check_parse_error("{{$a, $b := .l}}", "too many declarations");
    check_error("{{define \"T\"}}{{$.a}}{{end}}{{template \"T\" 1}}", "can't evaluate field a");
}

#[test]
fn conditions() {
    check("{{if .e}}1{{else if .t}}2{{else}}3{{end}}", "2");
    check("{{with .e}}1{{else with .s}}{{.}}{{end}}", "hello world");
    check("{{if .em}}y{{end}}{{if .el}}y{{end}}{{if .z}}y{{end}}{{if .n}}y{{end}}-", "-");
    check_parse_error("{{if .a}}", "unexpected EOF");
    check_parse_error("{{end}}", "unexpected {{end}}");
    check_parse_error("{{else}}", "unexpected {{else}}");
    check_parse_error("{{if .a}}{{else}}{{else}}{{end}}", "expected end; found {{else}}");
    check_parse_error("{{if}}{{end}}", "missing value for if");
}

#[test]
fn loops() {
    check("{{range $i, $e := .ls}}{{$i}}={{$e}};{{end}}", "0=x;1=y;2=z;");
    check("{{range $k, $v := .m}}{{$k}}={{$v}};{{end}}", "a=1;b=2;");
    check("{{range $i := 3}}{{$i}}{{end}}{{range 2}}{{.}}{{end}}", "01201");
    check("{{range .l}}{{if eq . 1.0}}{{continue}}{{end}}{{.}}{{end}}", "32");
    check("{{range .l}}{{if eq . 1.0}}{{break}}{{end}}{{.}}{{end}}", "3");
    check("{{range .n}}x{{else}}none{{end}}{{range .el}}x{{else}}none{{end}}", "nonenone");
    check_error("{{range .s}}{{end}}", "range can't iterate over hello world");
    check_error("{{range $i, $e := 3}}{{end}}", "more than one variable");
    check_parse_error("{{break}}", "outside {{range}}");
    check_parse_error("{{range .l}}{{define \"x\"}}{{end}}{{end}}", "unexpected {{define}}");
}

#[test]
fn templates() {
    check("{{define \"T\"}}<{{.}}>{{end}}{{template \"T\" .a}}{{template \"T\"}}", "<1><<no value>>");
    check("{{block \"B\" .s}}[{{.}}]{{end}}", "[hello world]");
    check("{{define \"R\"}}{{if .}}{{len .}}{{template \"R\" (slice . 1)}}{{end}}{{end}}{{template \"R\" .l}}", "321");
    check_error("{{template \"nosuch\"}}", "template \"nosuch\" not defined");
    check_error("{{define \"X\"}}{{template \"X\"}}{{end}}{{template \"X\"}}", "exceeded maximum template depth");
    check_parse_error("{{define \"x\"}}1{{end}}{{define \"x\"}}2{{end}}", "multiple definition of template");
    check_parse_error("{{template .a}}", "in template clause");
}

#[test]
fn pipelines() {
    check("{{.s | upper | printf \"%q\"}} {{1 | default 2}}", "\"HELLO WORLD\" 1");
    check("{{(1 | eq 1)}} {{and 1 0 2}} {{or 0 \"\"}} {{not 0}}", "true 0  true");
    check("{{or true (index .l 99)}} {{and false (index .l 99)}}", "true false");
    check_parse_error("{{.a | 3}}", "non executable command in pipeline stage 2");
    check_error("{{1 2}}", "can't give argument to non-function 1");
    check_error("{{upper}}", "wrong number of args for upper: want 1 got 0");
    check_parse_error("{{nosuch 1}}", "function \"nosuch\" not defined");
}

#[test]
fn comparisons() {
    check(
        "{{eq 1 2 3 1}} {{ne .nosuch \"\"}} {{eq .n nil}} {{eq .nosuch true}} {{lt \"a\" \"b\"}}",
        "true true true false true",
    );
    check_error("{{eq .a 1}}", "incompatible types for comparison: float64 and int");
    check_error("{{lt 1 \"a\"}}", "incompatible types");
    check_error("{{eq .l .l}}", "non-comparable type");
}

#[test]
fn printing() {
    check("{{.l}} {{.m}} {{print 1 2 \"a\" \"b\" 3}} {{println 1 \"a\"}}", "[3 1 2] map[a:1 b:2] 1 2ab3 1 a\n");
    check(r#"{{printf "%5d|%-5d|%05d|%+d|%x|%c|%U" 1 2 3 4 255 65 65}}"#, "    1|2    |00003|+4|ff|A|U+0041");
    check(
        r#"{{printf "%.2f %8.3f %e %g %t %v %q %s" 1.236 1.5 1.5 1.5 true .n "a\"" .ls}}"#,
        "1.24    1.500 1.500000e+00 1.5 true <nil> \"a\\\"\" [x y z]",
    );
    check(r#"{{printf "%d %s %t" "x" 5 1}}"#, "%!d(string=x) %!s(int=5) %!t(int=1)");
    check(
        r#"{{printf "%d %d" 1}} {{printf "%d" 1 2}} {{printf "%[2]d %[1]d" 1 2}} {{printf "%*d" 4 7}}"#,
        "1 %!d(MISSING) 1%!(EXTRA int=2) 2 1    7",
    );
    check("{{html \"<a'&\\\">\"}} {{js \"'=\"}} {{urlquery \"a b/c\"}}", "&lt;a&#39;&amp;&#34;&gt; \\'\\u003D a+b%2Fc");
    check("{{index .s 0}} {{len \"é\"}} {{index .m \"zz\"}} {{index .nest \"k\" \"deep\"}}", "104 2 <no value> v");
}

#[test]
fn limits_hold() {
    check_error("{{range until 90000}}{{range until 90000}}x{{end}}{{end}}", "more than");
    check_error(
        "{{$x := \"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\"}}{{range until 40}}{{$x = printf \"%s%s\" $x $x}}{{end}}",
        "bytes",
    );
    check_error("{{repeat 100000000 \"x\"}}", "more than");
    check_error("{{$x := list}}{{range until 1000}}{{$x = list $x}}{{end}}", "nested too deeply");
    check_error("{{$x := dict}}{{$_ := set $x \"x\" $x}}", "nested too deeply");
    let deep = format!("{}{{{{template \"T\" .}}}}{}", "{{if true}}".repeat(50), "{{end}}".repeat(50));
    check_error(
        &format!("{{{{define \"T\"}}}}{deep}{{{{end}}}}{{{{template \"T\" .}}}}"),
        "exceeded maximum template depth",
    );
    check_parse_error(&"{{if .a}}".repeat(300), "nested too deeply");
    check_parse_error(&format!("{{{{{}1{}}}}}", "(".repeat(300), ")".repeat(300)), "nested too deeply");
}

#[test]
fn other_delimiters() {
    let delimiters = Delimiters { left: "[[", right: "]]" };
    let template = Template::parse_with("t", "{{x}} [[ .a -]] \n y", delimiters, &Functions::sprig()).unwrap();
    assert_eq!(template.render(Value::from_json(&data()), Limits::default()).unwrap(), "{{x}} 1y");
}

#[test]
fn errors_name_the_place() {
    check_error("line\n  {{.s.x}}", "template: t:2:4: executing \"t\" at <.s.x>");
    check_parse_error("line\n{{nosuch}}", "template: t:2: function \"nosuch\" not defined");
}

#[test]
fn many_alternatives_take_no_stack() {
    let chain: String = (0..900).map(|n| format!("{{{{else if eq .a {n}.5}}}}x")).collect();
    check(&format!("{{{{if .e}}}}1{chain}{{{{else if .t}}}}2{{{{else}}}}3{{{{end}}}}"), "2");
    check("{{with .e}}1{{else with .s}}{{.}}{{else}}3{{end}}", "hello world");
    check("{{if $x := .e}}{{else if $y := .s}}{{$x}}{{$y}}{{end}}", "hello world");
    check_parse_error(&format!("{{{{if .a}}}}{}{{{{end}}}}", "{{else if .a}}".repeat(2000)), "nested too deeply");
    check_parse_error("{{if .a}}{{else}}{{else if .b}}{{end}}", "expected end");
}

#[test]
fn anything_can_be_compared_with_nil() {
    check("{{eq .em nil}} {{eq .el nil}} {{eq nil .n}} {{ne .m nil}}", "false false true true");
    check_error("{{eq .m .em}}", "non-comparable");
}
