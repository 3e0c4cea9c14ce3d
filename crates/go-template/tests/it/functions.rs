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
    check_error(r#"{{mustRegexMatch "(" "a"}}"#, "error parsing regexp");
}

#[test]
fn dates() {
    check(
        r#"{{toDate "2006-01-02" "2017-12-31" | date "02/01/2006"}} {{duration "95"}} {{durationRound "2h10m5s"}}"#,
        "31/12/2017 1m35s 2h",
    );
    check(r#"{{toDate "2006-01-02" "2017-12-31" | dateModify "-24h" | htmlDate}}"#, "2017-12-30");
}

/// What a comparison of many thousand generated templates with Go's engine and sprig found.
#[test]
fn found_by_comparison() {
    for (source, want) in [
        (r#"{{ upper "stra\u00dfe" }}"#, "STRA\u{df}E"),
        (r#"{{ initials "a b" }}{{ nospace "a b" }}"#, "abab"),
        (r#"{{ html 3 .n }}{{ urlquery nil }}"#, "3&lt;no value&gt;%3Cno+value%3E"),
        (r#"{{ semver "v1.2" }} {{ (semver "1.2.3-a").Prerelease }}"#, "1.2.0 a"),
        (r#"{{ (semver "1.2.3").Compare (semver "1.3") }}"#, "-1"),
        (r#"{{ semverCompare "1.2 - 2 || ~4" "4.9.1" }}"#, "true"),
        (
            r#"{{ b32dec "a" }}|{{ b64dec "hello world" }}"#,
            "illegal base32 data at input byte 0|illegal base64 data at input byte 5",
        ),
        (r#"{{ duration 3 }} {{ duration "90" }} {{ duration (int64 3700) }}"#, "0s 1m30s 1h1m40s"),
        (
            r#"{{ kebabcase "HTTP20xOK Bld4Floor3rd" }} {{ snakecase "  aB\t" }} {{ camelcase "a_b c\nd" }}"#,
            "http-20x-ok-bld4-floor-3rd __a_b_ ABCD",
        ),
        (r#"{{ wrapWith 5 "-" "abcdefgh ij" }} {{ wrap 5 "abcdefgh ij" }}"#, "abcde-fgh-ij abcdefgh\nij"),
        (r#"{{ splitn "" 2 "abc" }} {{ splitn "," 0 "a,b" }}"#, "map[_0:a _1:bc] map[]"),
        (
            r#"{{ typeOf (until 2) }} {{ typeOf (splitList "," "a") }} {{ typeOf (keys .m) }}"#,
            "[]int []string []string",
        ),
        (r#"{{ toJson (rest .el) }} {{ toJson (concat) }}"#, "null null"),
        (r#"{{ regexMatch "[" "a" }} {{ regexFind "\\w+" "\u00fcab" }} {{ regexFind "{" "a{" }}"#, "false ab {"),
        (r#"{{ regexSplit "" "abc" -1 }} {{ regexReplaceAll `\Qa.b\E` "a.b" "x" }}"#, "[a b c] x"),
        (r#"{{ chunk 2 .el | len }}"#, "0"),
        (r#"{{ addf 0.1 0.2 }} {{ divf 1 3 }} {{ mulf 0 -1 }}"#, "0.3 0.3333333333333333 0"),
        (r#"{{ int64 1e21 }} {{ int "10.00" }} {{ int "1_000" }}"#, "-9223372036854775808 10 1000"),
        (
            r#"{{ printf "%*d|%-5d|%05s|%#v|% x|%.3s|%+q" 4 7 3 "ab" .ls "hi" "abcd" "\u00fc" }}"#,
            "   7|3    |000ab|[]interface {}{\"x\", \"y\", \"z\"}|68 69|abc|\"\\u00fc\"",
        ),
        (
            r#"{{ printf "%d %!" "x" }} {{ printf "%[2]v %[1]v" 1 2 }} {{ printf "%[5]d" 1 }}"#,
            "%!d(string=x) %!!(MISSING) 2 1 %!d(BADINDEX)",
        ),
        (r#"{{ mergeOverwrite (dict "a" (dict "b" 2)) (dict "a" (dict "b" 0 "c" nil)) }}"#, "map[a:map[b:0 c:<nil>]]"),
        (r#"{{ merge (dict "a" (dict "b" 2)) (dict "a" (dict "b" 0 "c" nil "d" 1)) }}"#, "map[a:map[b:2 d:1]]"),
        (
            r#"{{ urlParse "https://u:p@h.example:8443/a%20b?x=1#f" }}"#,
            "map[fragment:f host:h.example:8443 hostname:h.example opaque: path:/a b query:x=1 scheme:https userinfo:u:p]",
        ),
        (
            r#"{{ date "Mon Jan _2 002 15:04:05.000 Z07:00" (toDate "2006-01-02T15:04:05Z07:00" "2026-03-04T05:06:07+01:00") }}"#,
            "Wed Mar  4 063 04:06:07.000 Z",
        ),
        (r#"{{ trunc 2.0 "abc" }}"#, "ab"),
        (r#"{{ $c := 1 }}{{ range $c = .el }}{{ else }}{{ $c }}{{ end }}"#, "[]"),
        (r#"{{ sortAlpha "b" }} {{ join "-" (list 1 nil "a") }}"#, "[b] 1-a"),
    ] {
        check(source, want);
    }
    for (source, want) in [
        ("{{ range $i, $x := 0 }}{{ end }}", "can't use 0 to iterate over more than one variable"),
        ("{{ $a = 1 }}", "undefined variable: $a"),
        ("{{ .n.x }}", "nil pointer evaluating interface {}.x"),
        (r#"{{ nindent -1 "a" }}"#, "negative Repeat count"),
        ("{{ unixEpoch 1 }}", "expected time.Time"),
        ("{{ divf 1 0 }}", "decimal division by 0"),
        ("{{ deepCopy nil }}", "zero Value"),
        (r#"{{ urlParse ":" }}"#, "missing protocol scheme"),
        (r#"{{ trunc (int64 2) "abc" }}"#, "expected int; got int64"),
        ("{{ genPrivateKey \"rsa\" }}", "not available"),
    ] {
        check_error(source, want);
    }
}

#[test]
fn titles_start_after_any_mark() {
    check(r#"{{title "don't stop_it a-b"}}"#, "Don'T Stop_it A-B");
}

#[test]
fn random_things_have_their_form() {
    check(r#"{{regexMatch "^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$" uuidv4}}"#, "true");
    check(
        r#"{{regexMatch "^[a-zA-Z0-9]{9}$" (randAlphaNum 9)}} {{regexMatch "^[a-zA-Z]{9}$" (randAlpha 9)}} {{len (randNumeric 5)}} {{len (randAscii 5)}} {{len (b64dec (randBytes 3) | printf "%q") | lt 1}}"#,
        "true true 5 5 true",
    );
    check(r#"{{randInt 3 4}} {{shuffle "aaa"}} {{shuffle "ab" | splitList "" | sortAlpha}}"#, "3 aaa [a b]");
    check(r#"{{getHostByName "127.0.0.1"}}"#, "127.0.0.1");
    check("{{eq uuidv4 uuidv4}}", "false");
    check_error("{{randInt 4 4}}", "Intn");
    check_error(r#"{{genCA "a" 1}}"#, "not available");
}

#[test]
fn dictionaries_of_the_data_change_for_the_rest_of_the_rendering() {
    check(
        r#"{{$_ := set .nest.k "new" 1}}{{.nest.k.new}} {{$_ := unset .nest.k "deep"}}{{hasKey .nest.k "deep"}}"#,
        "1 false",
    );
    check(r#"{{$_ := merge .nest (dict "k" (dict "x" 2))}}{{.nest.k.x}} {{.nest.k.deep}}"#, "2 v");
    check(r#"{{$_ := merge .nest .nest}}{{$_ := mergeOverwrite .nest.k .nest.k}}{{.nest.k.deep}}"#, "v");
    // The next rendering starts anew.
    check("{{hasKey .nest.k \"new\"}}", "false");
}

#[test]
fn sequences_take_three_numbers() {
    check("{{seq 1 2 5}}|{{seq 1 2 3 4}}|", "1 3 5||");
}

#[test]
fn what_cannot_be_printed_is_escaped_in_quotes() {
    check(
        "{{quote \"a\u{a0}b\u{ad}\u{e000}\u{200b}é\u{301}日\u{f0000}\"}}",
        "\"a\\u00a0b\\u00ad\\ue000\\u200bé\u{301}日\\U000f0000\"",
    );
}
