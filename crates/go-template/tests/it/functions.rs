use crate::{check, check_error};

#[test]
fn strings() {
    check(r#"{{trunc 3 "hello"}} {{trunc -3 "hello"}} {{substr 1 3 "hello"}} {{nospace "a b"}}"#, "hel llo el ab");
    check(
        r#"{{abbrev 5 "hello world"}} {{initials "foo bar"}} {{title "foo bar"}} {{swapcase "aB"}}"#,
        "he... fb Foo Bar Ab",
    );
    check(r#"{{wrap 5 "aa bb cc"}}"#, "aa bb\ncc");
    check(r#"{{kebabcase "FooBar"}} {{snakecase "FooBar"}} {{camelcase "foo_bar"}}"#, "foo-bar foo_bar FooBar");
    check(r#"{{quote "a" 1 nil}} {{squote "b"}} {{cat "a" 1 "b"}}"#, "\"a\" \"1\" 'b' a 1 b");
    check(
        r#"{{join "-" .l}} {{splitList "," "a,b"}} {{(split "$" "a$b")._1}} {{(splitn "," 2 "a,b,c")._1}}"#,
        "3-1-2 [a b] b b,c",
    );
    check(r#"{{"x" | nindent 2}}{{"a\nb" | indent 2}}"#, "\n  x  a\n  b");
    check(r#"{{trimPrefix "a" "ab"}}{{trimSuffix "b" "ab"}} {{trimAll "-" "-a-"}} {{repeat 2 "ab"}}"#, "ba a abab");
    check_error(r#"{{upper 1}}"#, "expected string");
}

#[test]
fn lists_and_dictionaries() {
    check(
        "{{rest (list 1)}} {{first (list)}} {{initial .l}} {{last .l}} {{reverse .l}}",
        "[] <no value> [3 1] 2 [2 1 3]",
    );
    check(
        "{{append .l 4}} {{prepend .l 0}} {{concat .l .ls}} {{uniq (list 1 1 2)}}",
        "[3 1 2 4] [0 3 1 2] [3 1 2 x y z] [1 2]",
    );
    check("{{has 3 .l}} {{has \"x\" .ls}} {{without .ls \"y\"}} {{compact (list \"\" 1)}}", "false true [x z] [1]");
    check("{{until 3}} {{untilStep 0 6 2}} {{seq 1 3}} {{chunk 2 .l}}", "[0 1 2] [0 2 4] 1 2 3 [[3 1] [2]]");
    check(
        "{{$d := dict \"a\" 1}}{{$_ := set $d \"b\" 2}}{{$d}} {{hasKey $d \"b\"}} {{get $d \"c\"}}|",
        "map[a:1 b:2] true |",
    );
    check(
        "{{merge (dict \"a\" 1) (dict \"a\" 2 \"b\" 3)}} {{mergeOverwrite (dict \"a\" 1) (dict \"a\" 2)}}",
        "map[a:1 b:3] map[a:2]",
    );
    check("{{dig \"k\" \"deep\" \"d\" .nest}} {{dig \"k\" \"no\" \"d\" .nest}} {{pluck \"a\" .m .em}}", "v d [1]");
    check("{{default \"x\" .e}} {{coalesce 0 \"\" 3}} {{ternary 1 2 .t}} {{empty .el}}", "x 3 1 true");
    check_error("{{fail \"why\"}}", "why");
}

#[test]
fn numbers() {
    check("{{add 1 2}} {{sub 5 2}} {{mul 2 3}} {{div 7 2}} {{mod 7 2}} {{max 1 5 3}} {{min 4 2}}", "3 3 6 3 1 5 2");
    check(
        "{{addf 1.1 2.2}} {{floor 1.7}} {{ceil 1.2}} {{round 1.256 2}} {{int \"12\"}} {{int 1.9}} {{atoi \"x\"}}",
        "3.3 1 2 1.26 12 1 0",
    );
    check_error("{{div 1 0}}", "division by zero");
}

#[test]
fn encodings_and_patterns() {
    check(r#"{{toJson "<a>"}} {{toRawJson "<a>"}} {{(fromJson "{\"a\":1}").a}}"#, r#""\u003ca\u003e" "<a>" 1"#);
    check(r#"{{b64enc "hi"}} {{b64dec "aGk="}} {{b32enc "hi"}} {{adler32sum "a"}}"#, "aGk= hi NBUQ==== 6422626");
    check(r#"{{sha1sum "a"}}"#, "86f7e437faa5a7fce15d1ddcb9eaeaea377667b8");
    check(
        r#"{{regexMatch "^a+$" "aa"}} {{regexReplaceAll "a(x*)b" "-axxb-" "${1}W"}} {{regexFindAll "[0-9]" "1a2" -1}}"#,
        "true -xxW- [1 2]",
    );
    check(r#"{{regexSplit "," "a,b" -1}} {{regexQuoteMeta "a.b"}} {{regexFind "[a-z]+" "12ab"}}"#, "[a b] a\\.b ab");
    check(r#"{{semverCompare ">=1.2.0" "1.3.0"}} {{(semver "v1.2.3").Minor}}"#, "true 2");
    check(r#"{{base "/a/b"}} {{dir "/a/b"}} {{ext "a.txt"}} {{clean "/a/../b"}} {{isAbs "/a"}}"#, "b /a .txt /b true");
    check(
        r#"{{(urlParse "http://u@h:80/p?q=1#f").hostname}} {{urlJoin (dict "scheme" "http" "host" "h" "path" "/p")}}"#,
        "h http://h/p",
    );
    check_error(r#"{{regexMatch "(" "a"}}"#, "error parsing regexp");
}

#[test]
fn dates() {
    check(
        r#"{{toDate "2006-01-02" "2017-12-31" | date "02/01/2006"}} {{duration 95}} {{durationRound "2h10m5s"}}"#,
        "31/12/2017 1m35s 2h",
    );
    check(r#"{{toDate "2006-01-02" "2017-12-31" | dateModify "-24h" | htmlDate}}"#, "2017-12-30");
}
