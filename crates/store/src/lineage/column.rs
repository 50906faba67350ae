//! Typed columns, and the macro that makes a table of a row type.

use arrow::array::{
    ArrayRef, AsArray, BooleanArray, Float64Array, StringArray, UInt32Array, UInt64Array,
};
use arrow::datatypes::{DataType, Float64Type, UInt32Type, UInt64Type};
use std::sync::Arc;

/// A type that a column can hold.
pub trait Column: Sized {
    /// The column's type.
    const TYPE: DataType;
    /// Whether it can be missing.
    const NULLABLE: bool;
    /// An array of values.
    fn array(values: Vec<Self>) -> ArrayRef;
    /// The values of an array; `None` when it is of another type, or misses what cannot be missing.
    fn values(array: &ArrayRef) -> Option<Vec<Self>>;
}

macro_rules! number {
    ($type:ty, $data:ident, $arrow:ident, $array:ident) => {
        impl Column for $type {
            const TYPE: DataType = DataType::$data;
            const NULLABLE: bool = false;
            fn array(values: Vec<Self>) -> ArrayRef {
                Arc::new($array::from(values))
            }
            fn values(array: &ArrayRef) -> Option<Vec<Self>> {
                <Option<$type>>::values(array)?.into_iter().collect()
            }
        }
        impl Column for Option<$type> {
            const TYPE: DataType = DataType::$data;
            const NULLABLE: bool = true;
            fn array(values: Vec<Self>) -> ArrayRef {
                Arc::new($array::from(values))
            }
            fn values(array: &ArrayRef) -> Option<Vec<Self>> {
                Some(array.as_primitive_opt::<$arrow>()?.iter().collect())
            }
        }
    };
}

number!(u32, UInt32, UInt32Type, UInt32Array);
number!(u64, UInt64, UInt64Type, UInt64Array);
number!(f64, Float64, Float64Type, Float64Array);

impl Column for bool {
    const TYPE: DataType = DataType::Boolean;
    const NULLABLE: bool = false;
    fn array(values: Vec<Self>) -> ArrayRef {
        Arc::new(BooleanArray::from(values))
    }
    fn values(array: &ArrayRef) -> Option<Vec<Self>> {
        array.as_boolean_opt()?.iter().collect()
    }
}

impl Column for String {
    const TYPE: DataType = DataType::Utf8;
    const NULLABLE: bool = false;
    fn array(values: Vec<Self>) -> ArrayRef {
        Arc::new(StringArray::from(values))
    }
    fn values(array: &ArrayRef) -> Option<Vec<Self>> {
        array.as_string_opt::<i32>()?.iter().map(|text| text.map(str::to_owned)).collect()
    }
}

impl Column for Option<String> {
    const TYPE: DataType = DataType::Utf8;
    const NULLABLE: bool = true;
    fn array(values: Vec<Self>) -> ArrayRef {
        Arc::new(StringArray::from(values))
    }
    fn values(array: &ArrayRef) -> Option<Vec<Self>> {
        Some(array.as_string_opt::<i32>()?.iter().map(|text| text.map(str::to_owned)).collect())
    }
}

/// Makes a struct and its table. The iteration is not a column of the file: the folder's name says
/// it, and readers that know partitions (DuckDB, pandas) add it.
macro_rules! table {
    ($(#[$doc:meta])* $row:ident, $name:literal { $($(#[$column_doc:meta])* $column:ident: $type:ty,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Default)]
        pub struct $row {
            $($(#[$column_doc])* pub $column: $type,)*
        }

        impl crate::lineage::Row for $row {
            const TABLE: &'static str = $name;

            fn schema() -> arrow::datatypes::SchemaRef {
                use crate::lineage::column::Column;
                std::sync::Arc::new(arrow::datatypes::Schema::new(vec![$(
                    arrow::datatypes::Field::new(
                        stringify!($column),
                        <$type as Column>::TYPE,
                        <$type as Column>::NULLABLE,
                    )
                ),*]))
            }

            fn columns(rows: &[Self]) -> Vec<arrow::array::ArrayRef> {
                use crate::lineage::column::Column;
                vec![$(
                    <$type as Column>::array(rows.iter().map(|row| row.$column.clone()).collect())
                ),*]
            }

            fn rows(batch: &arrow::array::RecordBatch) -> Result<Vec<Self>, String> {
                use crate::lineage::column::Column;
                $(
                    let array = batch
                        .column_by_name(stringify!($column))
                        .ok_or_else(|| format!("it has no column `{}`", stringify!($column)))?;
                    let $column = <$type as Column>::values(array).ok_or_else(|| {
                        format!("column `{}` is not of type {}", stringify!($column), <$type as Column>::TYPE)
                    })?;
                    let mut $column = $column.into_iter();
                )*
                (0..batch.num_rows())
                    .map(|_| Some($row { $($column: $column.next()?,)* }))
                    .collect::<Option<Vec<_>>>()
                    .ok_or_else(|| "its columns have different lengths".to_owned())
            }
        }
    };
}

pub(crate) use table;
