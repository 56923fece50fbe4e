//! ndarray arrays in and out, without a copy where the layout allows.

use super::{Cpu, Scalar, Shape, Tensor};
use ndarray::{Array, ArrayD, ArrayViewD, Dimension};

impl<T: Scalar, D: Dimension> From<Array<T, D>> for Tensor<Cpu<T>> {
    /// Takes the array's memory if it is contiguous and row-major, else copies.
    ///
    /// # Panics
    /// With more than four axes.
    fn from(array: Array<T, D>) -> Self {
        let shape = Shape::from(array.shape());
        let values = if array.is_standard_layout() {
            match array.into_raw_vec_and_offset() {
                (values, None | Some(0)) if values.len() == shape.len() => values,
                (values, offset) => values[offset.unwrap_or(0)..][..shape.len()].to_vec(),
            }
        } else {
            array.iter().copied().collect()
        };
        Tensor::from_vec(&Cpu::default(), shape, values)
    }
}

impl<T: Scalar> From<Tensor<Cpu<T>>> for ArrayD<T> {
    /// Takes the memory of a tensor that came from a vector or an array and shares it with no other, else copies.
    fn from(tensor: Tensor<Cpu<T>>) -> Self {
        let shape = tensor.shape();
        let mut values = std::sync::Arc::unwrap_or_clone(tensor.buffer).into_vec();
        values.truncate(shape.len()); // the buffer of a prefix is longer
        ArrayD::from_shape_vec(shape.dims(), values).expect("a tensor's buffer has its shape's length")
    }
}

impl<T: Scalar> Tensor<Cpu<T>> {
    /// The elements as an ndarray view, without a copy.
    pub fn view(&self) -> ArrayViewD<'_, T> {
        ArrayViewD::from_shape(self.shape().dims(), &self.buffer()[..self.len()])
            .expect("a tensor's buffer has its shape's length")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::{Array2, s};

    #[test]
    fn arrays_come_and_go() {
        let array = Array2::from_shape_fn((3, 4), |(i, j)| (10 * i + j) as f64);
        let address = array.as_ptr();
        let tensor = Tensor::from(array.clone());
        assert_eq!(tensor.view(), array.clone().into_dyn());
        assert_eq!(Tensor::from(array.t().to_owned()).view(), array.t().into_dyn());
        let part = array.clone().slice_move(s![1.., ..]);
        assert_eq!(Tensor::from(part).view(), array.slice(s![1.., ..]).into_dyn());
        let moved = Tensor::from(array);
        assert_eq!(moved.view().as_ptr(), address);
        assert_eq!(ArrayD::from(moved).as_ptr(), address);
    }
}
