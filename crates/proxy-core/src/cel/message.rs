//! Expressions as messages, as RBAC's conditions have them (`google.api.expr.v1alpha1.Expr`).

use envoy_api::pb::google::api::expr::v1alpha1 as pb;

use crate::cel::functions::Options;
use crate::cel::parse::MAX_DEPTH;
use crate::cel::value::SECOND;
use crate::cel::{Node, Value};

pub(super) fn node(expression: Option<&pb::Expr>, options: Options, depth: usize) -> Result<Node, String> {
    use pb::expr::ExprKind as Kind;
    if depth > MAX_DEPTH {
        return Err("it is nested too deeply".to_owned());
    }
    let below = |inner: Option<&pb::Expr>| node(inner, options, depth + 1);
    let all = |inner: &[pb::Expr]| inner.iter().map(|e| below(Some(e))).collect::<Result<Vec<_>, _>>();
    let kind = expression.and_then(|e| e.expr_kind.as_ref()).ok_or("invalid empty expression")?;
    match kind {
        Kind::ConstExpr(constant) => constant_value(constant).map(Node::Literal),
        Kind::IdentExpr(ident) => Ok(Node::identifier(&ident.name)),
        Kind::SelectExpr(select) => {
            let selected = Node::select(below(select.operand.as_deref())?, &select.field);
            if select.test_only { Node::has(vec![selected]) } else { Ok(selected) }
        }
        Kind::CallExpr(call) => {
            let mut arguments = all(&call.args)?;
            let method = call.target.is_some();
            if method {
                arguments.insert(0, below(call.target.as_deref())?);
            }
            match (call.function.as_str(), <[Node; 2]>::try_from(arguments)) {
                ("_&&_", Ok(both)) => Ok(Node::And(Box::new(both))),
                ("_||_", Ok(both)) => Ok(Node::Or(Box::new(both))),
                ("_[_]", Ok([of, key])) => Ok(Node::index(of, key)),
                (name, Ok(both)) => Node::call(name, method, both.into(), options),
                (name, Err(arguments)) => match (name, <[Node; 3]>::try_from(arguments)) {
                    ("_?_:_", Ok(three)) => Ok(Node::Choose(Box::new(three))),
                    (name, Ok(three)) => Node::call(name, method, three.into(), options),
                    (name, Err(arguments)) => Node::call(name, method, arguments, options),
                },
            }
        }
        Kind::ListExpr(list) if list.optional_indices.is_empty() => Ok(Node::list(all(&list.elements)?)),
        Kind::StructExpr(fields) if fields.message_name.is_empty() => {
            use pb::expr::create_struct::entry::KeyKind;
            let entry = |entry: &pb::expr::create_struct::Entry| match &entry.key_kind {
                Some(KeyKind::MapKey(key)) => Ok((below(Some(key))?, below(entry.value.as_ref())?)),
                _ => Err("maps have keys".to_owned()),
            };
            Ok(Node::map(fields.entries.iter().map(entry).collect::<Result<_, _>>()?))
        }
        Kind::ListExpr(_) | Kind::StructExpr(_) => Err("messages and optional values are not supported".to_owned()),
        Kind::ComprehensionExpr(_) => Err("Comprehension support is disabled".to_owned()),
    }
}

#[expect(deprecated, reason = "constants may still be spans and moments")]
fn constant_value(constant: &pb::Constant) -> Result<Value, String> {
    use pb::constant::ConstantKind as Kind;
    let nanos = |seconds: i64, nanos: i32| i128::from(seconds) * SECOND + i128::from(nanos);
    Ok(match constant.constant_kind.as_ref().ok_or("a constant without a value")? {
        Kind::NullValue(_) => Value::Null,
        Kind::BoolValue(b) => Value::Bool(*b),
        Kind::Int64Value(n) => Value::Int(*n),
        Kind::Uint64Value(n) => Value::Uint(*n),
        Kind::DoubleValue(n) => Value::Double(*n),
        Kind::StringValue(text) => Value::Text(text.clone()),
        Kind::BytesValue(bytes) => Value::Bytes(bytes.to_vec()),
        Kind::DurationValue(span) => Value::Duration(nanos(span.seconds, span.nanos)),
        Kind::TimestampValue(moment) => Value::Time(nanos(moment.seconds, moment.nanos)),
    })
}
