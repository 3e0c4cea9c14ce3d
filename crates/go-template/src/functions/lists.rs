//! sprig's functions on lists.

use super::{Args, Functions, Outcome};
use crate::value::{List, Value};

/// A nil slice.
fn nothing<'a>() -> Value<'a> {
    Value::List(List::Nil("[]interface {}"))
}

/// Items of a list made from a number.
const RANGE_LIMIT: i64 = 100_000;

pub(super) fn define(functions: &mut Functions) {
    functions.define("list", 0, None, |args| Ok(Value::list(args.all().to_vec())));
    functions.define("tuple", 0, None, |args| Ok(Value::list(args.all().to_vec())));
    for name in ["first", "mustFirst"] {
        functions.define(name, 1, Some(1), |args| Ok(args.list(0, "first")?.get(0).unwrap_or(Value::Nil)));
    }
    for name in ["last", "mustLast"] {
        functions.define(name, 1, Some(1), |args| {
            let list = args.list(0, "last")?;
            Ok(list.get(list.len().wrapping_sub(1)).unwrap_or(Value::Nil))
        });
    }
    for name in ["rest", "mustRest"] {
        functions.define(name, 1, Some(1), |args| {
            let items = args.list(0, "rest")?.to_vec();
            Ok(if items.is_empty() { nothing() } else { Value::list(items[1..].to_vec()) })
        });
    }
    for name in ["initial", "mustInitial"] {
        functions.define(name, 1, Some(1), |args| {
            let mut items = args.list(0, "initial")?.to_vec();
            Ok(if items.pop().is_none() { nothing() } else { Value::list(items) })
        });
    }
    for name in ["append", "push", "mustAppend", "mustPush"] {
        functions.define(name, 2, Some(2), |args| {
            let mut items = match args.get(0) {
                Value::List(list) => list.to_vec(),
                other => return Err(format!("Cannot push on type {}", other.kind())),
            };
            items.push(args.get(1).clone());
            Ok(Value::list(items))
        });
    }
    for name in ["prepend", "mustPrepend"] {
        functions.define(name, 2, Some(2), |args| {
            let mut items = vec![args.get(1).clone()];
            match args.get(0) {
                Value::List(list) => items.extend(list.iter()),
                other => return Err(format!("Cannot prepend on type {}", other.kind())),
            }
            Ok(Value::list(items))
        });
    }
    functions.define("concat", 0, None, |args| {
        let mut items = Vec::new();
        for value in args.all() {
            match value {
                Value::List(list) => items.extend(list.iter()),
                other => return Err(format!("Cannot concat type {} as list", other.kind())),
            }
        }
        Ok(if items.is_empty() { nothing() } else { Value::list(items) })
    });
    for name in ["reverse", "mustReverse"] {
        functions.define(name, 1, Some(1), |args| Ok(Value::list(args.list(0, "reverse")?.iter().rev().collect())));
    }
    for name in ["uniq", "mustUniq"] {
        functions.define(name, 1, Some(1), |args| {
            let mut items: Vec<Value<'_>> = Vec::new();
            for item in args.list(0, "uniq")?.iter() {
                if !items.contains(&item) {
                    items.push(item);
                }
            }
            Ok(Value::list(items))
        });
    }
    for name in ["without", "mustWithout"] {
        functions.define(name, 1, None, |args| {
            let unwanted = &args.all()[1..];
            let items = args.list(0, "without")?.iter().filter(|item| !unwanted.contains(item)).collect();
            Ok(Value::list(items))
        });
    }
    for name in ["has", "mustHas"] {
        functions.define(name, 2, Some(2), |args| match args.get(1) {
            Value::Nil => Ok(Value::Bool(false)),
            Value::List(list) => Ok(Value::Bool(list.iter().any(|item| item == *args.get(0)))),
            other => Err(format!("Cannot find has on type {}", other.kind())),
        });
    }
    for name in ["compact", "mustCompact"] {
        functions.define(name, 1, Some(1), |args| {
            Ok(Value::list(args.list(0, "compact")?.iter().filter(|item| !super::collections::empty(item)).collect()))
        });
    }
    for name in ["slice", "mustSlice"] {
        functions.define(name, 1, None, slice);
    }
    for name in ["chunk", "mustChunk"] {
        functions.define(name, 2, Some(2), chunk);
    }
    functions.define("until", 1, Some(1), |args| {
        let count = args.int(0)?;
        range(0, count, if count < 0 { -1 } else { 1 })
    });
    functions.define("untilStep", 3, Some(3), |args| range(args.int(0)?, args.int(1)?, args.int(2)?));
    functions.define("seq", 0, None, seq);
}

fn chunk<'a>(args: Args<'a, '_>) -> Outcome<'a> {
    let size = args.int(0)?;
    let items = match args.get(1) {
        Value::List(list) => list.to_vec(),
        other => return Err(format!("Cannot chunk type {}", other.kind())),
    };
    // What sprig computes of a size that makes no sense.
    let chunks = ((items.len() as f64 - 1.0) / size as f64).floor() + 1.0;
    if size == 0 || chunks < 0.0 || (size < 0 && chunks > 1.0) {
        return Err("runtime error: makeslice: len out of range".to_owned());
    }
    // One chunk of everything where the size is negative: the same remainder.
    let parts = items.chunks(usize::try_from(size).unwrap_or(usize::MAX)).map(|part| Value::list(part.to_vec()));
    let parts = parts.take(chunks as usize).collect();
    Ok(Value::List(List::typed(parts, "[][]interface {}")))
}

fn slice<'a>(args: Args<'a, '_>) -> Outcome<'a> {
    let list: &List<'a> = match args.get(0) {
        Value::List(list) => list,
        other => return Err(format!("list should be type of slice or array but {}", other.kind())),
    };
    if list.is_empty() {
        return Ok(Value::Nil);
    }
    let bound = |index: usize, default: usize| match args.all().get(index) {
        None => Ok(default),
        Some(value) => usize::try_from(crate::format::to_int(value))
            .map_err(|_| "reflect.Value.Slice: slice index out of bounds".to_owned()),
    };
    let (from, to) = (bound(1, 0)?, bound(2, list.len())?);
    match list.to_vec().get(from..to) {
        Some(items) => Ok(Value::List(match list {
            List::Typed(_, ty) => List::typed(items.to_vec(), ty),
            _ => List::new(items.to_vec()),
        })),
        None => Err("reflect.Value.Slice: slice index out of bounds".to_owned()),
    }
}

fn range<'a>(start: i64, stop: i64, step: i64) -> Outcome<'a> {
    let mut items = Vec::new();
    if step == 0 || (stop < start) != (step < 0) {
        return Ok(Value::List(List::typed(items, "[]int")));
    }
    if (stop.saturating_sub(start) / step).saturating_abs() > RANGE_LIMIT {
        return Err(format!("a list of more than {RANGE_LIMIT} items"));
    }
    let mut at = start;
    while (step > 0 && at < stop) || (step < 0 && at > stop) {
        items.push(Value::int(at));
        at = at.saturating_add(step);
    }
    Ok(Value::List(List::typed(items, "[]int")))
}

/// As the shell's `seq`: numbers with spaces between.
fn seq<'a>(args: Args<'a, '_>) -> Outcome<'a> {
    let (first, step, last) = match args.len() {
        0 => return Ok(Value::from("")),
        1 => {
            let last = args.int(0)?;
            (1, if last < 1 { -1 } else { 1 }, last)
        }
        2 => {
            let (first, last) = (args.int(0)?, args.int(1)?);
            (first, if last < first { -1 } else { 1 }, last)
        }
        3 => (args.int(0)?, args.int(1)?, args.int(2)?),
        _ => return Ok(Value::from("")),
    };
    if last < first && step > 0 {
        return Ok(Value::from(""));
    }
    let stop = last.saturating_add(if last < first { -1 } else { 1 });
    let Value::List(items) = range(first, stop, step)? else { return Ok(Value::from("")) };
    let words: Vec<String> = items.iter().map(|item| crate::format::sprint(&item)).collect();
    Ok(Value::from(words.join(" ")))
}
