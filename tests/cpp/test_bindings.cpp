// What the calls of torch and of NumPy share: guards, and how work is shared out.
#include <stdexcept>
#include <thread>

#include "cpu/share_out.h"
#include "harness.h"
#include "operators/guard.h"

namespace {

using namespace pruneopd;

Array array(Shape shape, std::string dtype = "float32") {
  Shape strides(shape.size(), 1);
  for (size_t axis = shape.size(); axis-- > 1;) strides[axis - 1] = strides[axis] * shape[axis];
  static int64_t somewhere[4096];
  return {somewhere, std::move(dtype), "cpu", std::move(shape), std::move(strides)};
}

template <class Call>
void refuses(const std::string& words, const Call& call) {
  try {
    call();
    report("nothing was refused, and should have been: ", words);
  } catch (const std::runtime_error& error) {
    if (error.what() != words) report(error.what(), " is not ", words);
  }
}

TEST(guards_refuse_logits) {
  const Guard guard("reliability", "cpu");
  const auto logits = [&](const Array& student, const Array& teacher, std::optional<int64_t> vocab_size = {},
                          bool along_responses = true) {
    return guard.logits_pair(student, teacher, 1, 1, vocab_size, along_responses).first;
  };
  const Array good = array({2, 8, 64});
  CHECK(logits(good, array({2, 8, 64}, "bfloat16")).vocab_size == 64);
  CHECK(logits(good, array({2, 8, 72}), 60).vocab_size == 60);
  CHECK(logits(array({64}), array({64}), {}, false).rows.at.count() == 1);
  refuses("reliability: student_logits must have shape [B, T, V] or [N, V], got [3]",
          [&] { logits(array({3}), good); });
  refuses("reliability: student_logits must have shape [..., V], got []", [&] { logits(array({}), good, {}, false); });
  refuses("reliability: student_logits must have dtype float32, bfloat16 or float16, got int64",
          [&] { logits(array({2, 8, 64}, "int64"), good); });
  refuses("reliability: teacher_logits must have shape [2, 8, V], got [2, 7, 64]",
          [&] { logits(good, array({2, 7, 64})); });
  refuses("reliability: teacher_logits must have shape [2, 8, V], got [64]", [&] { logits(good, array({64})); });
  refuses(
      "reliability: vocab_size must be given when the last axes of student_logits and teacher_logits differ, got 64 "
      "and 72",
      [&] { logits(good, array({2, 8, 72})); });
  refuses("reliability: vocab_size must be between 1 and min(student, teacher) width = 64, got 65",
          [&] { logits(good, good, 65); });
  refuses("reliability: vocab_size must be between 1 and min(student, teacher) width = 0, got 0",
          [&] { logits(array({2, 8, 0}), array({2, 8, 0})); });
  Array strided = good;
  strided.strides.back() = 2;
  refuses("reliability: student_logits must have stride 1 on its last axis, got 2", [&] { logits(strided, good); });
  refuses("reliability: teacher_logits must have stride 1 on its last axis, got 2", [&] { logits(good, strided); });
  strided = array({2, 8, 1});
  strided.strides.back() = 7;
  CHECK(logits(strided, strided).rows.step == 1);
  Array elsewhere = good;
  elsewhere.device = "cuda:0";
  refuses("reliability: teacher_logits must be on cpu, got cuda:0", [&] { logits(good, elsewhere); });
  const Guard second_gpu("reliability", "cuda:1");
  refuses("reliability: student_logits must be on cuda:1, got cuda:0",
          [&] { second_gpu.logits_pair(elsewhere, elsewhere, 1, 1, {}, true); });
  refuses("reliability: k must be between 1 and min(vocab_size, 256) = 64, got 65", [&] { guard.check_k(65, 64); });
  refuses("reliability: k must be between 1 and min(vocab_size, 256) = 256, got 0", [&] { guard.check_k(0, 5000); });
  guard.check_k(0, 5000, /*least=*/0);
  refuses("reliability: k must be between 0 and min(vocab_size, 256) = 64, got -1", [&] { guard.check_k(-1, 64, 0); });
}

TEST(guards_refuse_what_goes_with_positions) {
  const Guard guard("op", "cpu");
  CHECK(!guard.values("mask", std::nullopt, {2, 8}, kMask));
  for (const std::string_view dtype : kMask.names)
    CHECK(guard.values("mask", array({2, 8}, std::string(dtype)), {2, 8}, kMask));
  refuses("op: mask must have shape [2, 8], got [8]", [&] { guard.values("mask", array({8}), {2, 8}, kMask); });
  refuses("op: mask must have dtype bool, integer or float, got complex64",
          [&] { guard.values("mask", array({2, 8}, "complex64"), {2, 8}, kMask); });
  refuses("op: token_ids must have dtype int32 or int64, got uint32",
          [&] { guard.values("token_ids", array({8}, "uint32"), {8}, kIds); });
  refuses("op: student_topk_ids must have shape [B, T, k] or [N, k] with 1 <= k <= 256, got [4, 257]",
          [&] { guard.topk_ids("student_topk_ids", array({4, 257}, "int64")); });
  refuses("op: student_topk_ids must have shape [B, T, k] or [N, k] with 1 <= k <= 256, got [4]",
          [&] { guard.topk_ids("student_topk_ids", array({4}, "int64")); });
  refuses("op: drift must have shape [B, T] or [N], got []", [&] { guard.drift(array({}, "bool")); });
  refuses("op: drift must have dtype bool, got uint8", [&] { guard.drift(array({3}, "uint8")); });

  Array column = array({2, 8, 4}, "int64");
  column.strides = {1, 2, 16};
  const View rows = guard.rows("teacher_topk_ids", column, {2, 8, 4}, kIds);
  CHECK(rows.step == 16 && rows.at.count() == 16 && rows.at.offset(9) == 3);
}

TEST(guards_refuse_what_goes_with_one_model) {
  const Guard guard("op", "cpu");
  const auto one = [&](const Array& logits, std::optional<int64_t> vocab_size = {}) {
    return guard.one_logits(logits, .5, vocab_size);
  };
  const Logits whole = one(array({2, 8, 64}, "float16"));
  CHECK(whole.vocab_size == 64 && whole.temperature == .5 && whole.rows.step == 1 && whole.rows.at.count() == 16);
  CHECK(one(array({64}), 60).vocab_size == 60);
  refuses("op: logits must have shape [..., V], got []", [&] { one(array({})); });
  refuses("op: logits must have dtype float32, bfloat16 or float16, got float64",
          [&] { one(array({8, 64}, "float64")); });
  Array strided = array({8, 64});
  strided.strides.back() = 2;
  refuses("op: logits must have stride 1 on its last axis, got 2", [&] { one(strided); });
  Array elsewhere = array({8, 64});
  elsewhere.device = "cuda:0";
  refuses("op: logits must be on cpu, got cuda:0", [&] { one(elsewhere); });
  for (const int64_t size : {0, 65})
    refuses("op: vocab_size must be between 1 and the logits' width = 64, got " + std::to_string(size),
            [&] { one(array({8, 64}), size); });
  refuses("op: vocab_size must be between 1 and the logits' width = 0, got 0", [&] { one(array({8, 0})); });

  const auto ids = [&](const Array& given) { return guard.ids("token_ids", given, {2, 8}, 512, "m"); };
  CHECK(ids(array({2, 8, 512}, "int32")).at.count() == 16);
  for (const auto& [shape, words] : std::vector<std::pair<Shape, std::string>>{
           {{2, 8, 513}, "[2, 8, 513]"}, {{2, 8, 0}, "[2, 8, 0]"}, {{2, 7, 4}, "[2, 7, 4]"}, {{2, 8}, "[2, 8]"}})
    refuses("op: token_ids must have shape [2, 8, m] with 1 <= m <= 512, got " + words,
            [&] { ids(array(shape, "int64")); });
  refuses("op: token_ids must have dtype int32 or int64, got uint8", [&] { ids(array({2, 8, 4}, "uint8")); });
  refuses("op: coefficients must have dtype float32 or float64, got float16",
          [&] { guard.rows("coefficients", array({2, 8, 4}, "float16"), {2, 8, 4}, kGradient); });
  refuses("op: state must have shape [2, 8, 5], got [2, 8, 2]",
          [&] { guard.rows("state", array({2, 8, 2}), {2, 8, 5}, kState); });
  refuses("op: state must have dtype float64, got float32",
          [&] { guard.rows("state", array({2, 8, 5}), {2, 8, 5}, kState); });
  refuses("op: entropy_coefficient must have shape [2, 8], got [8]",
          [&] { guard.values("entropy_coefficient", array({8}), {2, 8}, kGradient); });
}

TEST(guards_refuse_layouts) {
  const Guard guard("op", "cpu");
  const auto layout = [&](const Shape& positions, const MaybeArray& starts) {
    return guard.responses(positions, starts, "drift is [N]", "drift is [B, T]");
  };
  const Array starts = array({3}, "int32");
  CHECK(layout({7}, starts).count == 2 && layout({7}, starts).positions == 7);
  CHECK(layout({3, 5}, std::nullopt).count == 3 && layout({3, 5}, std::nullopt).positions == 15);
  refuses("op: cu_seqlens must be given when drift is [N], got None", [&] { layout({7}, std::nullopt); });
  refuses("op: cu_seqlens must be None when drift is [B, T], got shape [3]", [&] { layout({7, 1}, starts); });
  refuses("op: cu_seqlens must have shape [B + 1], got [0]", [&] { layout({7}, array({0}, "int32")); });
  refuses("op: cu_seqlens must have shape [B + 1], got [1, 2]", [&] { layout({7}, array({1, 2}, "int32")); });
  CHECK(layout({7}, array({2}, "int64")).count == 1);
  refuses("op: cu_seqlens must have dtype int32 or int64, got int16", [&] { layout({7}, array({2}, "int16")); });
  Array counts = array({2}, "int32");
  counts.strides = {3};
  const View carried = guard.values("drift_count", counts, {2}, kInt32);
  CHECK(carried.data == counts.data && carried.at.count() == 2 && carried.at.offset(1) == 3);
  refuses("op: drift_count must have shape [3], got [2]", [&] { guard.values("drift_count", counts, {3}, kInt32); });
}

TEST(guards_refuse_words) {
  const Guard guard("op", "cpu");
  refuses("op: metric must be one of 'overlap', 'top_p', got 'x'", [&] { guard.metric("x"); });
  refuses("op: reward_weight must be one of 'student', 'teacher', 'none', got ''", [&] { guard.reward_weight(""); });
  refuses("op: token_ids must be given when metric is 'top_p', got None",
          [&] { guard.check_given_for_top_p({guard.metric("top_p")}, "token_ids", std::nullopt); });
  guard.check_given_for_top_p({guard.metric("overlap")}, "token_ids", std::nullopt);
}

void start_threads(int64_t workers, const std::function<void()>& worker) {
  std::vector<std::jthread> threads;
  for (int64_t n = 0; n < workers; ++n) threads.emplace_back(worker);
}

TEST(work_is_shared_out_once) {
  for (const int64_t count : {0, 1, 2, 7, 100, 5000})
    for (const int64_t grain : {0, 1, 3, 64, 10000})
      for (const int64_t threads : {1, 2, 5}) {
        std::vector<std::atomic<int>> visits(static_cast<size_t>(count));
        std::atomic<int64_t> short_blocks = 0;
        share_out(
            count, grain, threads,
            [&](int64_t begin, int64_t end) {
              CHECK(begin < end && end <= count);
              short_blocks += end - begin < grain;
              for (int64_t n = begin; n < end; ++n) ++visits[static_cast<size_t>(n)];
            },
            start_threads);
        for (const std::atomic<int>& visit : visits) CHECK(visit == 1);
        CHECK(short_blocks <= 1);
      }
}

TEST(an_exception_leaves_no_thread) {
  std::atomic<int64_t> done = 0;
  refuses("stop", [&] {
    share_out(
        100000, 1, 3,
        [&](int64_t begin, int64_t) {
          ++done;
          if (begin == 0) throw std::runtime_error("stop");
        },
        start_threads);
  });
  CHECK(done < 100000);
}

}  // namespace
